"""Building token folders: formats, exactness, resuming after SIGKILL, and one builder at a time."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from data_samples import make_texts, write_jsonl  # beside this file

from jaxscale.data import build as build_module
from jaxscale.data.blocks import START
from jaxscale.data.build import build
from jaxscale.data.ensure import ensure_built
from jaxscale.data.errors import DataError
from jaxscale.data.token_file import open_token_file
from jaxscale.data.tokenizer import load_tokenizer

FILES = ("tokens.bin", "documents.bin", "document_bytes.bin", "header.json")


def documents_of(file, tokenizer) -> list[str]:
    assert (file.tokens[file.offsets[1:] - 1] == tokenizer.end_of_document).all()
    return [tokenizer.decode(file.tokens[a : b - 1]) for a, b in zip(file.offsets, file.offsets[1:], strict=False)]


def check(file, tokenizer, texts):
    file.verify()
    assert documents_of(file, tokenizer) == texts
    assert file.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert file.header.bytes == sum(len(text.encode()) for text in texts)
    assert (file.header.documents, file.header.tokens) == (len(texts), len(file.tokens))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("source", ["jsonl", "jsonl.gz", "parquet", "text", "txt.gz", "glob", "memory"])
def test_formats(source, kind, request, tmp_path):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    texts = make_texts(40)
    path = tmp_path / f"data.{source}"
    if source == "jsonl":
        write_jsonl(path, texts)
    elif source == "jsonl.gz":
        path.write_bytes(gzip.compress(write_jsonl(tmp_path / "plain", texts).read_bytes()))
    elif source == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"n": list(range(40)), "text": texts}), path, row_group_size=7)
    elif source in ("text", "txt.gz"):
        path = tmp_path / "folder" / "deep"
        path.mkdir(parents=True)
        texts = [text or "-" for text in texts]
        for i, text in enumerate(texts):
            data = text.encode()
            name = f"{i:03}.txt" + (".gz" if source == "txt.gz" else "")
            (path / name).write_bytes(gzip.compress(data) if source == "txt.gz" else data)
        (tmp_path / "folder" / ".hidden.txt").write_text("not me")
        (tmp_path / "folder" / "image.png").write_bytes(b"\xff")
        path = path.parent
    elif source == "glob":
        write_jsonl(tmp_path / "a-1.jsonl", texts[:15])
        write_jsonl(tmp_path / "a-2.jsonl", texts[15:])
        path = tmp_path / "a-*.jsonl"
    else:
        import fsspec

        fsspec.filesystem("memory").pipe("/bucket/a.jsonl", write_jsonl(tmp_path / "plain", texts).read_bytes())
        path = "memory://bucket/*.jsonl"
    file = build([str(path)], tmp_path / "out", tokenizer, block_bytes=300)
    check(file, tokenizer, texts)
    assert file.header.dtype == "uint16"
    saved = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert saved.hash == file.header.tokenizer_hash == tokenizer.hash
    leftovers = {p.name for p in tmp_path.iterdir() if "out" in p.name}
    assert leftovers == {"out", ".out.lock"}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path, byte_tokenizer):
    text = "no mark" if name.endswith(".txt") else '{"text": "no mark"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    check(build([str(tmp_path / name)], tmp_path / "out", byte_tokenizer), byte_tokenizer, ["no mark"])


def test_wide_ids(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, **{f"w{i}": i for i in range(1, 70001)}}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    file = build([str(write_jsonl(tmp_path / "a.jsonl", ["w1 w70000"]))], tmp_path / "out", tokenizer)
    assert (file.header.dtype, file.header.largest_token) == ("uint32", 70000)
    assert file.tokens.tolist() == [1, 70000, 0]
    file.verify()


def test_result_depends_on_nothing_but_input(tmp_path, bpe_tokenizer):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(60)))
    reference = build([source], tmp_path / "one", bpe_tokenizer, workers=1)
    for number, (workers, block) in enumerate([(1, 100), (2, 500), (3, 100)]):
        other = build([source], tmp_path / f"other{number}", bpe_tokenizer, workers=workers, block_bytes=block)
        for name in FILES:
            assert (other.folder / name).read_bytes() == (reference.folder / name).read_bytes(), (name, workers, block)


def test_text_field_and_blank_lines(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text('\ufeff{"body": "one"}\n\n   \r\n{"body": "two"}', encoding="utf-8")
    check(
        build([str(tmp_path / "a.jsonl")], tmp_path / "out", byte_tokenizer, text_field="body"),
        byte_tokenizer,
        ["one", "two"],
    )


def test_same_build_again_is_returned_and_another_refused(tmp_path, byte_tokenizer, bpe_tokenizer):
    a, b = (str(write_jsonl(tmp_path / f"{n}.jsonl", make_texts(5, seed))) for seed, n in enumerate("ab"))
    build([a], tmp_path / "out", byte_tokenizer)
    before = os.stat(tmp_path / "out" / "tokens.bin")
    build([a], tmp_path / "out", byte_tokenizer)
    assert os.stat(tmp_path / "out" / "tokens.bin") == before
    with pytest.raises(DataError, match="tokenizers do not mix in one folder"):
        build([a], tmp_path / "out", bpe_tokenizer)
    with pytest.raises(DataError, match="holds other data"):
        build([b], tmp_path / "out", byte_tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="exists and is no token folder"):
        build([a], tmp_path / "mine", byte_tokenizer)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


KILLED = """
import sys, time
from pathlib import Path
from jaxscale.data import writing
from jaxscale.data.build import build
from jaxscale.data.tokenizer import load_tokenizer
source, out, tokenizer, workers = sys.argv[1:]
commit = writing._commit
def slow(*arguments):
    commit(*arguments)
    print("committed", flush=True)
    time.sleep(0.02)
writing._commit = slow
build([source], out, load_tokenizer(tokenizer), workers=int(workers), block_bytes=2000, commit_seconds=0.0)
"""


@pytest.mark.parametrize(("ending", "workers"), [("jsonl", 1), ("jsonl.gz", 2), ("parquet", 1), ("txt", 1)])
def test_killed_build_goes_on_bit_for_bit(ending, workers, tmp_path, bpe_tokenizer):
    texts = make_texts(300, longest=400)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    if ending == "jsonl.gz":
        source = tmp_path / "a.jsonl.gz"
        source.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    elif ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": texts}), source, row_group_size=90)
    elif ending == "txt":
        source = tmp_path / "folder"
        source.mkdir()
        for number, text in enumerate(texts):
            (source / f"{number:03}.txt").write_text(text or "-", encoding="utf-8")
    reference = build([str(source)], tmp_path / "reference", bpe_tokenizer)
    bpe_tokenizer.save(tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(tmp_path / "tokenizer"), str(workers)]
    progress = []
    for kills in (3, 4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(kills):
                assert process.stdout.readline() == "committed\n"
            process.send_signal(signal.SIGKILL)
        assert not out.exists()
        progress.append(json.loads((tmp_path / "out.building" / "journal.json").read_text())["documents"])
    assert 0 < progress[0] < progress[1] < 300, progress
    # Bytes after the last journal, as a kill between writing and journal leaves them.
    for name in FILES[:3]:
        with open(tmp_path / "out.building" / name, "ab") as file:
            file.write(b"torn")
    read = []
    real = build_module.read_blocks
    build_module.read_blocks = lambda *a: read.append(a[3]) or real(*a)
    try:
        file = build([str(source)], out, bpe_tokenizer)
    finally:
        build_module.read_blocks = real
    assert read[0] != START, "started again from the beginning"
    file.verify()
    for name in FILES:
        assert (file.folder / name).read_bytes() == (reference.folder / name).read_bytes(), name


def test_unfinished_build_with_other_input_starts_over_with_other_tokenizer_refuses(
    tmp_path, byte_tokenizer, bpe_tokenizer
):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    byte_tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(tmp_path / "tokenizer"), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.kill()
    with pytest.raises(DataError, match="unfinished build with another tokenizer"):
        build([str(source)], tmp_path / "out", bpe_tokenizer)
    assert (tmp_path / "out.building" / "journal.json").exists()
    changed = make_texts(50, seed=9)
    write_jsonl(source, changed)
    check(build([str(source)], tmp_path / "out", byte_tokenizer), byte_tokenizer, changed)


def test_one_builder_at_a_time(tmp_path, byte_tokenizer):
    import filelock

    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(5)))
    with (
        filelock.FileLock(tmp_path / ".out.lock"),
        pytest.raises(DataError, match="another process is building"),
    ):
        build([source], tmp_path / "out", byte_tokenizer)
    build([source], tmp_path / "out", byte_tokenizer)


RACE = """
import sys
from jaxscale.data import build as module
from jaxscale.data.ensure import ensure_built
from jaxscale.data.tokenizer import load_tokenizer
source, cache = sys.argv[1:]
real = module.read_blocks
def read(*arguments):
    print("built", flush=True)
    return real(*arguments)
module.read_blocks = read
print("ready", flush=True)
sys.stdin.readline()
print(ensure_built(source, load_tokenizer("bytes"), cache).header.content)
"""


def test_many_processes_ask_and_one_builds(tmp_path, byte_tokenizer):
    source, cache = str(write_jsonl(tmp_path / "a.jsonl", make_texts(200))), str(tmp_path / "c")
    command = [sys.executable, "-c", RACE, source, cache]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("built" in output for output in outputs) == 1
    content = ensure_built(source, byte_tokenizer, cache).header.content
    assert {output[-1] for output in outputs} == {content}


def test_cache_is_by_content(tmp_path, byte_tokenizer, bpe_tokenizer):
    texts = make_texts(10)
    a = ensure_built(str(write_jsonl(tmp_path / "a.jsonl", texts)), byte_tokenizer)
    (tmp_path / "elsewhere").mkdir()
    b = ensure_built(str(write_jsonl(tmp_path / "elsewhere" / "b.jsonl", texts)), byte_tokenizer)
    assert a.folder == b.folder
    assert a.folder.parent == tmp_path / "cache" / "data"
    assert ensure_built(str(tmp_path / "a.jsonl"), bpe_tokenizer).folder != a.folder
    write_jsonl(tmp_path / "a.jsonl", [*texts, "more"])
    assert ensure_built(str(tmp_path / "a.jsonl"), byte_tokenizer).header.documents == 11
    # A built folder is used as it is, with its own tokenizer only.
    assert ensure_built(str(a.folder), byte_tokenizer, str(tmp_path / "unused")).folder == a.folder
    assert not (tmp_path / "unused").exists()
    with pytest.raises(DataError, match=r"was built with tokenizer bytes .* set data.tokenizer to"):
        ensure_built(str(a.folder), bpe_tokenizer)


def test_large_files_are_identified_by_their_ends(tmp_path, monkeypatch):
    from jaxscale.data import sources

    monkeypatch.setattr(sources, "WHOLE_CONTENT", 1000)
    monkeypatch.setattr(sources, "_EDGE", 100)
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    found = sources.find_inputs([str(path)])
    first = sources.identities(found)
    assert sources.identities(found) == first
    os.utime(path, (1, 1))
    touched = sources.identities(found)
    assert touched != first
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))
    assert sources.identities(found) != touched


def test_builtin_corpus(byte_tokenizer):
    from jaxscale.data import builtin

    texts = list(builtin.documents())
    file = ensure_built("builtin", byte_tokenizer)
    check(file, byte_tokenizer, texts)
    assert len(texts) >= 200
    assert 300_000 < file.header.bytes < 1_000_000
    # The text may never change by accident: checkpoints and golden losses depend on it.
    assert file.header.content == "bd92ae42e74827bb86c6baa53c09275f"


def test_workers_leave_with_their_parent(tmp_path, byte_tokenizer):
    psutil = pytest.importorskip("psutil")
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    byte_tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(tmp_path / "tokenizer"), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        children = psutil.Process(process.pid).children()
        process.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_opens_only_whole_folders(tmp_path):
    (tmp_path / "x.building").mkdir()
    with pytest.raises(DataError, match="is no token folder"):
        open_token_file(tmp_path / "x.building")
