"""Which documents a build keeps: filters, duplicates, and what it says of those it dropped."""

import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from data_samples import make_texts, write_jsonl  # beside this file
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.data.build import build
from jaxscale.data.duplicates import Duplicates, make_keys, rows_of_band
from jaxscale.data.errors import DataError
from jaxscale.data.filters import MEASURES, parse_filters
from jaxscale.data.manifest import load_manifest
from jaxscale.data.seen import Seen
from jaxscale.data.selection import Selection, from_text

FILES = ("tokens.bin", "documents.bin", "document_bytes.bin", "header.json", "manifest.json", "quarantine.jsonl")


def words(count, seed):
    """A text of its own: random words."""
    letters = np.random.default_rng(seed).integers(97, 123, (count, 6), np.uint8)
    return " ".join(row.tobytes().decode() for row in letters)


def changed(text, share, seed):
    """The text with a run of words of this share replaced."""
    parts = text.split()
    count = round(len(parts) * share)
    start = len(parts) // 3
    return " ".join([*parts[:start], *words(count, seed + 10_000).split(), *parts[start + count :]])


def corpus():
    """Texts, and by number what becomes of each that is not kept."""
    texts, fate = [], {}
    for number in range(60):
        text = words(80 + number, number)
        texts.append(text)
        if number % 7 == 0:
            fate[len(texts)] = "exact-duplicate"
            texts.append(f"  {text.replace(' ', chr(10), 3)} ")
        if number % 11 == 0:
            fate[len(texts)] = "near-duplicate"
            texts.append(changed(text, 0.03, number))
        if number % 13 == 0:
            texts.append(changed(text, 0.6, number))  # another text
        if number % 17 == 0:
            fate[len(texts)] = "min-characters=50"
            texts.append("too short")
    return texts, fate


SELECTION = Selection(filters=parse_filters(["min-characters=50"]), deduplicate="near")


def texts_of(file, tokenizer):
    return [tokenizer.decode(file.tokens[a : b - 1]) for a, b in zip(file.offsets, file.offsets[1:], strict=False)]


def test_what_is_dropped_and_why(tmp_path, byte_tokenizer):
    texts, fate = corpus()
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    file = build([str(source)], tmp_path / "out", byte_tokenizer, selection=SELECTION, block_bytes=3000)
    assert texts_of(file, byte_tokenizer) == [text for number, text in enumerate(texts) if number not in fate]
    file.verify()
    manifest = load_manifest(file.folder)
    reasons = sorted(set(fate.values()))
    assert manifest["total"]["dropped"] == {reason: list(fate.values()).count(reason) for reason in reasons}
    for reason in reasons:
        places = [{"input": "a.jsonl", "record": number + 1} for number, why in fate.items() if why == reason]
        assert manifest["examples"][reason] == places[:5]
    assert manifest["total"]["documents"] == len(texts) - len(fate) == file.header.documents
    assert manifest["selection"] == {
        "text_field": "text",
        "filters": ["min-characters=50"],
        "deduplicate": "near",
        "similarity": 0.8,
    }


def test_exact_leaves_near_ones(tmp_path, byte_tokenizer):
    texts, fate = corpus()
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    file = build([str(source)], tmp_path / "out", byte_tokenizer, selection=Selection(deduplicate="exact"))
    dropped = [number for number, why in fate.items() if why == "exact-duplicate"]
    short = [number for number, why in fate.items() if why == "min-characters=50"][1:]  # the same short text again
    assert texts_of(file, byte_tokenizer) == [t for n, t in enumerate(texts) if n not in {*dropped, *short}]


def test_the_result_depends_on_neither_blocks_nor_processes(tmp_path, byte_tokenizer):
    texts, _ = corpus()
    half = len(texts) // 2
    paths = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", part))
        for name, part in zip("ab", (texts[:half], texts[half:]), strict=True)
    ]
    folders = []
    for number, (workers, block) in enumerate([(1, 1 << 20), (1, 300), (2, 2000)]):
        options = {"workers": workers, "block_bytes": block}
        folders.append(build(paths, tmp_path / str(number), byte_tokenizer, selection=SELECTION, **options).folder)
    for name in FILES:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


KILLED = """
import json, sys
from jaxscale.data import writing
from jaxscale.data.build import build
from jaxscale.data.selection import from_text
from jaxscale.data.tokenizer import load_tokenizer
source, out, selection, commits = sys.argv[1:]
left = int(commits)
commit = writing._commit
def counted(*arguments):
    global left
    commit(*arguments)
    left -= 1
    if left == 0:
        import os
        os.kill(os.getpid(), 9)
writing._commit = counted
build([source], out, load_tokenizer("bytes"), selection=from_text(selection), max_bad=100, block_bytes=2000,
      commit_seconds=0.0)
"""


@pytest.mark.parametrize("deduplicate", ["exact", "near"])
def test_a_killed_build_knows_what_was_there_before(tmp_path, byte_tokenizer, deduplicate):
    texts, _ = corpus()
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:30], *(changed(text, 0.03, 99) for text in texts[:30])])
    lines = source.read_text().splitlines()
    lines[20], lines[90] = "{", '{"text": 3}'
    source.write_text("\n".join(lines))
    selection = Selection(filters=SELECTION.filters, deduplicate=deduplicate)
    reference = build([str(source)], tmp_path / "reference", byte_tokenizer, selection=selection, max_bad=2)
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), selection.text()]
    for commits in ("5", "9"):
        assert subprocess.run([*command, commits], check=False).returncode == -9
        for name in ("exact.keys", "quarantine.jsonl"):
            with open(tmp_path / "out.building" / name, "ab") as file:
                file.write(b"torn")
    assert 0 < json.loads((tmp_path / "out.building" / "journal.json").read_text())["judged"] < len(texts) + 30
    file = build([str(source)], tmp_path / "out", byte_tokenizer, selection=selection, max_bad=2)
    for name in FILES:
        assert (file.folder / name).read_bytes() == (reference.folder / name).read_bytes(), name
    assert not list(file.folder.glob("*.keys"))
    assert not list(tmp_path.rglob("*.index"))


def test_near_duplicates_are_found_by_their_similarity():
    """Of 200 pairs that share 0.9 of their shingles nearly all, of 200 that share half none, at a similarity of 0.8."""
    originals = [words(200, seed) for seed in range(200)]
    for share, least, most in ((0.02, 190, 200), (0.3, 0, 0)):
        twins = [changed(text, share, seed) for seed, text in enumerate(originals)]
        found = int((judged([*originals, *twins], "near", 0.8)[200:] == 2).sum())
        assert least <= found <= most, (share, found)


def judged(texts, deduplicate, similarity=0.8, batch=37):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        duplicates = Duplicates(Path(folder), deduplicate, similarity)
        try:
            parts = [
                duplicates.judge(make_keys(texts[first : first + batch], deduplicate))
                for first in range(0, len(texts), batch)
            ]
        finally:
            duplicates.close()
        return np.concatenate(parts)


def test_unicode_form_and_space_make_no_other_text():
    same = ["caf\u00e9 noir", "cafe\u0301  noir", "\tcaf\u00e9\nnoir "]
    assert judged([*same, "cafe noir", "Caf\u00e9 noir"], "exact").tolist() == [0, 1, 1, 0, 0]


def test_most_pairs_of_the_similarity_share_a_band():
    for similarity in (0.5, 0.7, 0.8, 0.9, 0.95):
        rows = rows_of_band(similarity)
        recall = 1 - (1 - similarity**rows) ** (128 // rows)
        assert recall >= 0.9
        assert 1 - (1 - similarity ** (2 * rows)) ** (64 // rows) < 0.9, "longer bands would compare fewer pairs"


def test_a_set_of_keys_knows_who_was_first(tmp_path):
    """Against a dict, over many batches with repeated keys, among them 0; the table grows from 8 slots on."""
    rng, mirror, number = np.random.default_rng(0), {}, 0
    seen = Seen(tmp_path / "index", slots=8)
    for _ in range(60):
        keys = rng.integers(0, 3000, rng.integers(1, 200)).astype(np.uint64) * np.uint64(1 << 52)
        numbers = np.arange(number, number + len(keys))
        number += len(keys)
        expected = [mirror.setdefault(int(key) or 1, int(at)) for key, at in zip(keys, numbers, strict=True)]
        assert seen.claim(keys, numbers).tolist() == expected
    assert len(seen) == len(mirror)
    assert not list(tmp_path.iterdir()), "a scratch file has no name"
    seen.close()


MEMORY = """
import sys
import numpy as np
from pathlib import Path
from jaxscale.data.seen import Seen
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
seen = Seen(Path(sys.argv[1]))
rng = np.random.default_rng(0)
before = None
for number in range(int(sys.argv[2])):
    seen.claim(rng.integers(1, 2**64 - 1, 50_000, np.uint64), np.arange(50_000) + number * 50_000)
    before = before or peak()
print(len(seen), (peak() - before) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells the peak of a process alone")
def test_a_set_of_keys_lets_go_of_its_memory(tmp_path):
    """3 M keys take a table of 128 MiB, which is built from one of 64 MiB."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "index"), "60"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    keys, grown = map(int, result.stdout.split())
    assert keys == 3_000_000
    assert grown < 90, f"{grown} MiB"


@pytest.mark.parametrize(
    ("word", "keeps", "drops"),
    [
        ("min-characters=5", "12345", "  1234  \n"),
        ("max-characters=5", " 12345\n", "123456"),
        ("max-symbol-share=0.3", "so, what? no, a text.", "{[(<>)]};;; a"),
        ("max-symbol-share=0.3", "नमस्ते दुनिया में", "—…« » ¿¡ नम"),
        ("max-digit-share=0.5", "call 555 now", "555 123 44 a"),
        ("max-repeated-lines=0.5", "a\nb\na\nc", "a\na\na\na\nb"),
        (
            "max-repeated-text=0.4",
            "one thing after the other, and then some more of it",
            "again and again and again, " * 20,
        ),
        ("max-longest-line=10", "0123456789\nabc", "0123456789a\nabc"),
    ],
)
def test_filters(word, keeps, drops):
    (one,) = parse_filters([word])
    assert one.name == word
    assert one.keeps(keeps)
    assert not one.keeps(drops)
    for text in ("", "\n", " ", "\ud7ff", "é" * 100):
        one.keeps(text)


@pytest.mark.parametrize(
    "word",
    [
        "min-words=3",
        "characters=3",
        "min-characters",
        "max-digit-share=many",
        "max-digit-share=-1",
        "",
        "min-=1",
        "max-characters=nan",
        "max-characters=inf",
    ],
)
def test_what_is_no_filter(word):
    with pytest.raises(DataError, match=r"is no filter; write min- or max-.*Measured are characters, symbol-share"):
        parse_filters([word])


@given(st.text(max_size=80))
def test_shares_count_characters(text):
    """Against a loop over them."""
    solid = [one for one in text if not one.isspace()]
    symbols = [
        one
        for one in solid
        if unicodedata.category(one)[0] in "PS" or (one.isascii() and not one.isalnum() and one.isprintable() is False)
    ]
    assert MEASURES["symbol-share"](text) == len(symbols) / max(len(solid), 1)
    assert MEASURES["digit-share"](text) == sum(one.isdecimal() for one in solid) / max(len(solid), 1)


def test_selections(tmp_path, byte_tokenizer, monkeypatch):
    for wrong in ({"deduplicate": "fuzzy"}, {"similarity": 0.1}, {"similarity": 1.1}, {"similarity": float("nan")}):
        with pytest.raises(DataError, match=r"--(deduplicate|similarity) is"):
            Selection(**wrong)
    with pytest.raises(DataError, match="name one twice"):
        Selection(filters=parse_filters(["min-characters=3", "min-characters=3.0"]))
    every = Selection("body", parse_filters(["max-digit-share=0.1234567", "min-characters=3"]), "near", 0.75)
    assert from_text(every.text()) == every
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(20)))
    with pytest.raises(DataError, match=r"has no document left \(min-characters=1000 dropped 20\)"):
        build(
            [source],
            tmp_path / "none",
            byte_tokenizer,
            selection=Selection(filters=parse_filters(["min-characters=1000"])),
        )
    build([source], tmp_path / "out", byte_tokenizer, selection=Selection(deduplicate="exact"))
    with pytest.raises(DataError, match="holds other data"):
        build([source], tmp_path / "out", byte_tokenizer)
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(DataError, match=r"pip install 'jaxscale\[duplicates\]', or use --deduplicate exact"):
        build([source], tmp_path / "near", byte_tokenizer, selection=Selection(deduplicate="near"))
    assert not (tmp_path / "near.building").exists()
