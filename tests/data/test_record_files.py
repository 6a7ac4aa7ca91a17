"""Tar, TFRecord and ArrayRecord: what is in them, damage of every kind, and going on where a build was killed."""

import contextlib
import gzip
import itertools
import json
import random
import shutil

import fsspec
import pytest
from data_samples import make_texts  # beside this file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_samples import example, payloads, tar, tfrecord, write_array_record  # beside this file

from jaxscale.data.blocks import START, Piece
from jaxscale.data.build import build
from jaxscale.data.errors import DataError
from jaxscale.data.example import text_of_example
from jaxscale.data.manifest import load_manifest
from jaxscale.data.reading import read_blocks
from jaxscale.data.record_files import text_of_record
from jaxscale.data.sources import find_inputs
from jaxscale.data.tokenizer import ByteTokenizer

TEXTS = [text or "-" for text in make_texts(40)]


def texts_of(file):
    tokenizer = ByteTokenizer()
    return [tokenizer.decode(file.tokens[a : b - 1]) for a, b in itertools.pairwise(file.offsets)]


def members(texts):
    """Samples as WebDataset has them: a text, an object with a text, both; an image beside each."""
    for number, text in enumerate(texts):
        key = f"shard/{number:06}.v1" if number % 2 else f"{number:06}"
        if number % 3 != 1:
            yield f"{key}.txt" if "v1" not in key else f"shard/{number:06}.txt", text.encode()
        stem = f"shard/{number:06}" if number % 2 else f"{number:06}"
        if number % 3:
            yield f"{stem}.json", json.dumps({"text": text if number % 3 == 1 else "not me"}).encode()
        yield f"{stem}.jpg", b"\xff\xd8"


def written(folder, kind, texts):
    path = folder / f"a.{kind}"
    if kind.startswith("tfrecord"):
        data = tfrecord(payloads(texts))
    elif kind.startswith("tar"):
        data = tar(members(texts))
    else:
        return write_array_record(path, payloads(texts))
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


KINDS = ("tar", "tar.gz", "tfrecord", "tfrecord.gz", "array_record", "tfrecord-00003-of-00010")


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_read(kind, tmp_path, byte_tokenizer):
    path = written(tmp_path, kind, TEXTS)
    for size in (1 << 20, 100):
        file = build([str(path)], tmp_path / str(size), byte_tokenizer, block_bytes=size)
        assert texts_of(file) == TEXTS
    assert load_manifest(file.folder)["parents"][0]["kind"] == kind.split(".")[0].split("-")[0]


@pytest.mark.parametrize("kind", KINDS[:5])
def test_reading_goes_on_from_any_block(kind, tmp_path):
    inputs = find_inputs([str(written(tmp_path, kind, TEXTS))])
    blocks = list(read_blocks(inputs, "text", 300))
    assert len(blocks) > 5
    for number, block in enumerate(blocks):
        rest = [piece for later in blocks[number + 1 :] for piece in later.pieces]
        again = [piece for later in read_blocks(inputs, "text", 300, block.after) for piece in later.pieces]
        assert again == rest
    assert [piece.line for block in blocks for piece in block.pieces] == list(range(1, 41))


def refused(tmp_path, path, message, set_aside, kept, max_bad=1, text_field="text"):
    """The build fails with this message; with a bound it goes on without what is damaged."""
    with pytest.raises(DataError, match=message):
        build([str(path)], tmp_path / "out", ByteTokenizer(), text_field=text_field)
    assert not (tmp_path / "out").exists()
    good = tmp_path / "z.txt"
    good.write_text("the other file")
    file = build([str(path), str(good)], tmp_path / "out", ByteTokenizer(), text_field=text_field, max_bad=max_bad)
    assert texts_of(file) == [*kept, "the other file"]
    lines = [json.loads(line) for line in (file.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["record"], line["lost"] > 0) for line in lines] == set_aside


def test_a_tfrecord_with_a_wrong_checksum(tmp_path):
    data = bytearray(tfrecord([b"one", b"two", b"three"]))
    path = tmp_path / "a.tfrecord"
    data[(16 + 3) + 12] ^= 1
    path.write_bytes(data)
    refused(tmp_path, path, r"a\.tfrecord, record 2: its checksum is wrong", [(2, False)], ["one", "three"])


def test_a_tfrecord_whose_framing_is_lost(tmp_path):
    data = bytearray(tfrecord([b"one", b"two", b"three"]))
    data[(16 + 3) + 2] ^= 1
    path = tmp_path / "a.tfrecord"
    path.write_bytes(data)
    refused(tmp_path, path, r"record 2: the checksum of its length is wrong", [(2, True)], ["one"])


@pytest.mark.parametrize("cut", [1, 4, 5, 12, 20])
def test_a_tfrecord_that_is_cut_short(tmp_path, cut):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(tfrecord([b"one", b"two", b"three"])[:-cut])
    refused(
        tmp_path,
        path,
        r"a\.tfrecord is no whole TFRecord file \(it ends inside record 3\)",
        [(3, True)],
        ["one", "two"],
    )


@pytest.mark.parametrize("where", ["cut at a member", "cut in a header", "cut in a text", "header", "no end"])
def test_a_damaged_tar(tmp_path, where):
    data = bytearray(tar((f"{number}.txt", b"text %d" % number) for number in range(4)))
    size = 1024 * 4
    if where == "header":
        data[1024 * 2 + 5] ^= 1
    data = data[
        : {"cut at a member": 2048, "cut in a header": 2048 + 100, "cut in a text": 2048 + 514, "no end": size}.get(
            where, len(data)
        )
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    count = {"no end": 4, "cut in a text": 3}.get(where, 2)  # where the damage is seen
    kept = [f"text {number}" for number in range(count - 1)]  # the last sample may have had more files
    refused(tmp_path, path, r"a\.tar is not a whole tar file", [(count, True)], kept)


def test_a_tar_without_texts(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(
        tar([("1.txt", b"one"), ("2.jpg", b"x"), ("3.json", b"{"), ("4.json", b'{"text": 3}'), ("5.txt", b"\xff")])
    )
    refused(
        tmp_path,
        path,
        r"sample 2 \(2\): no text; it has \.jpg, a text is in \.txt",
        [(n, False) for n in (2, 3, 4, 5)],
        ["one"],
        4,
    )


def test_an_array_record_file_that_is_cut_short_or_garbage(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [b"one", b"two"])
    for data in (path.read_bytes()[:-100], b"z" * 5000):
        path.write_bytes(data)
        refused(tmp_path, path, r"a\.array_record is not readable ArrayRecord \(.*(footer|64KB|file)", [(1, True)], [])
        shutil.rmtree(tmp_path / "out")


def test_damage_inside_an_array_record_file_costs_its_group(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=200)) for _ in range(40)]
    path = write_array_record(tmp_path / "a.array_record", [text.encode() for text in texts])
    data = bytearray(path.read_bytes())
    data[2000] ^= 0xFF  # of about 4,600 with records
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.array_record, record \d+: it cannot be read"):
        build([str(path)], tmp_path / "out", ByteTokenizer())
    file = build([str(path)], tmp_path / "out", ByteTokenizer(), max_bad=4)
    lines = [json.loads(line) for line in (file.folder / "quarantine.jsonl").read_text().splitlines()]
    lost = [line["record"] - 1 for line in lines]
    assert lost == list(range(lost[0], lost[0] + 4))
    assert texts_of(file) == [text for number, text in enumerate(texts) if number not in lost]


def test_a_missing_package_is_named(tmp_path, monkeypatch, byte_tokenizer):
    path = written(tmp_path, "tfrecord", ["a"])
    monkeypatch.setitem(__import__("sys").modules, "google_crc32c", None)
    with pytest.raises(DataError, match=r"needs google-crc32c: pip install 'jaxscale\[records\]'"):
        build([str(path)], tmp_path / "out", byte_tokenizer)
    fsspec.filesystem("memory").pipe("/b/a.array_record", b"x" * 100)
    with pytest.raises(DataError, match="ArrayRecord, which is read from local files only"):
        build(["memory://b/a.array_record"], tmp_path / "out", byte_tokenizer)


def test_what_a_record_holds():
    where = "f, record 1"
    for data, text in (
        (b"plain", b"plain"),
        (b"\n\nplain", b"\n\nplain"),
        (b"{ int x; }", b"{ int x; }"),
        (b"", b""),
        (b'{"text": "a"}', b"a"),
        (example({"text": b"\xff"}), b"\xff"),  # whether it is UTF-8 is seen where it is decoded
        (example({}), b"\n\x00"),
    ):
        assert text_of_record(data, where, "text") == text
    for data, message in (
        (example({"body": b"a", "n": [3]}), "no feature 'text'; the record has body, n: .*text-field"),
        (example({"text": [3]}), "feature 'text' holds integers, not one text"),
        (example({"text": [b"a", b"b"]}), "feature 'text' holds 2 texts, not one text"),
        (b'{"text": "a"', "f, record 1: not valid JSON"),
        (b'{"body": "a"}', "f, record 1: no field 'text'; the record has body"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ):
        with pytest.raises(DataError, match=message):
            text_of_record(data, where, "text")


@given(st.dictionaries(st.text(max_size=5), st.binary(max_size=200), min_size=1, max_size=4))
def test_an_example_gives_its_features(features):
    for name, value in features.items():
        assert text_of_example(example(features), "x", name) == value


@given(st.binary(max_size=60))
def test_no_bytes_break_the_reader_of_examples(data):
    with contextlib.suppress(DataError):
        text_of_example(data, "x", "text")


@pytest.mark.parametrize(
    "kind", ["tar", "tar.gz", "tfrecord", "tfrecord.gz", "array_record", "jsonl", "jsonl.gz", "parquet"]
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_told_and_good_documents_before_it_stay(kind, data, tmp_path_factory):
    """Bytes flipped, cut off or replaced: no other error than ours. Where the format has checksums: no text that was
    not there, and documents keep their order."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = sample(folder, kind)
    raw = bytearray(path.read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "zero", "garbage"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if how == "cut":
        raw = raw[: max(at, 1)]
    elif how == "garbage":
        raw = bytearray(data.draw(st.binary(min_size=1, max_size=300)))
    else:
        stop = at + 1 if how == "flip" else min(at + 40, len(raw))
        raw[at:stop] = bytes((byte ^ 0x55 if how == "flip" else 0) for byte in raw[at:stop])
    path.write_bytes(raw)
    blocks = list(read(path))
    pieces = [piece for block in blocks for piece in block.pieces]
    if kind.startswith("tfrecord") or kind == "array_record":
        found = [piece.data.decode() for piece in pieces]
        assert is_part(found, TEXTS), "a text that was not there"
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert all(problem.message for block in blocks for problem in block.problems)
    if how == "cut" and at < len(raw) * 3 // 4 and kind != "jsonl":
        assert any(block.problems for block in blocks)


def read(path):
    try:
        inputs = find_inputs([str(path)])
        yield from read_blocks(inputs, "text", 500, START)
    except DataError as error:  # a Parquet file whose column has another name now
        if "no column" not in str(error):
            raise


def sample(folder, kind):
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet", row_group_size=7)
        return folder / "a.parquet"
    if kind.startswith("jsonl"):
        data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
        (folder / f"a.{kind}").write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        return folder / f"a.{kind}"
    return written(folder, kind, TEXTS)


def is_part(found, texts):
    """Whether `found` is what is left of `texts` when some are taken out."""
    rest = iter(texts)
    return all(text in rest for text in found)
