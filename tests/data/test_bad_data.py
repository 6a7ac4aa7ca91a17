"""Bad input: one error that says what, where and how to fix it, and nothing half-written."""

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
from data_samples import make_texts, write_jsonl  # beside this file

from jaxscale.data import writing
from jaxscale.data.build import build
from jaxscale.data.ensure import ensure_built
from jaxscale.data.errors import DataError
from jaxscale.data.tokenizer import ByteTokenizer


def refused(tmp_path, source, message, **options):
    """The build fails with this message and leaves nothing at all, in one process and in two."""
    for workers in (1, 2):
        with pytest.raises(DataError, match=message):
            build([str(source)], tmp_path / "out" / "deep", ByteTokenizer(), workers=workers, **options)
        assert not [p.name for p in tmp_path.rglob("*") if "out" in p.name]


GOOD = json.dumps({"text": "good"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jsonl", b"", r"empty\.jsonl is empty \(0 bytes\)"),
        ("blank.jsonl", b"\n \n", r"blank\.jsonl holds no documents"),
        ("empty.txt", b"", r"empty\.txt is empty"),
        (
            "cut.jsonl.gz",
            gzip.compress(GOOD * 999, mtime=0)[:-20],
            r"cut\.jsonl\.gz is not a whole gzip file .*truncated",
        ),
        ("cut.txt.gz", gzip.compress(GOOD * 999, mtime=0)[:-20], r"cut\.txt\.gz is not a whole gzip file .*truncated"),
        ("plain.jsonl.gz", GOOD, r"plain\.jsonl\.gz is not a whole gzip file"),
        ("bad.jsonl", GOOD * 2 + b"{'text': 3}\n" + GOOD, r"bad\.jsonl:3: not valid JSON"),
        ("cut.jsonl", GOOD * 3 + GOOD[:9], r"cut\.jsonl:4: not valid JSON .*truncated"),
        ("deep.jsonl", GOOD + b"[" * 100_000, r"deep\.jsonl:2: not valid JSON"),
        ("list.jsonl", GOOD + b"[1]\n", r"list\.jsonl:2: a JSON list, not an object"),
        (
            "field.jsonl",
            GOOD + b'{"body": "x", "a": 1}\n',
            r"field\.jsonl:2: no field 'text'; the line has a, body: .*text-field",
        ),
        ("digits.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", r"digits\.jsonl:1: not valid JSON"),
        ("null.jsonl", GOOD + b'{"text": null}\n', r"null\.jsonl:2: field 'text' holds None, not text"),
        ("half.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"half\.jsonl:2: the text has half a surrogate pair"),
        (
            "latin.jsonl",
            GOOD * 2 + b'{"text": "caf\xe9"}\n',
            rf"latin\.jsonl:3: not UTF-8 at byte {2 * len(GOOD) + 13} \(0xe9",
        ),
        ("latin.txt", b"caf\xe9 noir", r"latin\.txt: not UTF-8 at byte 3 \(0xe9.*convert the file to UTF-8"),
        ("wide.txt", "text".encode("utf-16"), r"wide\.txt: not UTF-8 at byte 0"),
        ("data.csv", b"a,b\n", r"cannot tell the format of .*data\.csv"),
        ("cut.parquet", b"PAR1" + b"x" * 100, r"cut\.parquet is not readable Parquet .*fetch it again"),
    ],
)
def test_bad_files(name, data, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    refused(tmp_path, path, message)


def test_line_numbers_count_over_blocks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 100 + b"\n" + b"nonsense\n")
    refused(tmp_path, path, r"a\.jsonl:102: not valid JSON", block_bytes=50)
    path.write_bytes(GOOD * 100 + b'{"text": "\xff"}\n')
    refused(tmp_path, path, rf"a\.jsonl:101: not UTF-8 at byte {100 * len(GOOD) + 10} ", block_bytes=50)


def test_missing(tmp_path):
    refused(tmp_path, tmp_path / "nowhere.jsonl", r"nowhere\.jsonl is not there")
    refused(tmp_path, tmp_path / "*.jsonl", r"\*\.jsonl is not there")
    refused(tmp_path, "memory://no-such-place/a.jsonl", r"memory://no-such-place/a\.jsonl is not there")
    refused(tmp_path, "nosuchprotocol://a.jsonl", r"cannot read nosuchprotocol://a\.jsonl")
    refused(tmp_path, "", r"'' is not there")
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path, tmp_path / "pipe.txt", r"pipe\.txt is no plain file")
    (tmp_path / "folder").mkdir()
    refused(tmp_path, tmp_path / "folder", r"holds no file of a known format")
    (tmp_path / "folder" / "a.txt").write_text("")
    (tmp_path / "folder" / "b.txt").write_text("b")
    refused(tmp_path, tmp_path / "folder", r"a\.txt is empty")
    with pytest.raises(DataError, match="is named 2 times"):
        build([str(tmp_path / "folder" / "b.txt")] * 2, tmp_path / "out", ByteTokenizer())


def test_an_address_whose_package_is_not_installed(tmp_path, monkeypatch):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(
        known_implementations,
        "faraway",
        {"class": "no_such_package.FileSystem", "err": "FarawayFileSystem needs no_such_package"},
    )
    refused(tmp_path, "faraway://host/a.jsonl", "cannot read faraway:.* needs no_such_package; install what is named")


def test_parquet(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    refused(tmp_path, path, r"has no column 'text'; it has body, n: .*text-field")
    refused(tmp_path, path, r"row 1: column 'n' holds 1, not text", text_field="n")
    pq.write_table(pa.table({"text": ["a", "b", None, "d"]}), path, row_group_size=2)
    refused(tmp_path, path, r"a\.parquet, row 3: column 'text' holds None, not text")
    pq.write_table(pa.table({"text": [b"a", b"b\xff"]}), path)
    refused(tmp_path, path, r"a\.parquet, row 2: not UTF-8 at byte 1 of the text")
    path.write_bytes(path.read_bytes()[:-30])
    refused(tmp_path, path, r"a\.parquet is not readable Parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused(tmp_path, path, r"needs pyarrow: pip install 'jaxscale\[parquet\]'")


def test_a_folder_that_cannot_be_written_names_the_settings(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    (tmp_path / "file").touch()
    message = (
        r"token files cannot be built in .*: .*; choose a folder .*data\.cache or the variable JAXSCALE_CACHE, --out"
    )
    refused(tmp_path / "file", source, message)
    with pytest.raises(DataError, match=message):
        ensure_built(str(source), ByteTokenizer(), str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=message):
        ensure_built(str(source), ByteTokenizer())

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    refused(tmp_path, source, r"cannot be built in .*out: Read-only file system; choose a folder")


def test_a_refused_build_leaves_alone_what_was_there(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(DataError, match="exists and is no token folder"):
        build([str(source)], tmp_path / "out", ByteTokenizer())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.jsonl", "out", "thesis.tex"]


@pytest.mark.parametrize("place", ["_append", "replace_text"])
def test_full_disk(place, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    real, calls = getattr(writing, place), []

    def full(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(writing, place, full)
    with pytest.raises(DataError, match=r"the disk of .* is full .* the unfinished build was removed"):
        build([str(source)], tmp_path / "out", ByteTokenizer(), block_bytes=100, commit_seconds=0)
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl"}


def test_worker_that_dies(tmp_path, monkeypatch):
    from jaxscale.data import workers

    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    real = workers._Worker.tokenise

    def dies(self, block):
        self._process.kill()
        return real(self, block)

    monkeypatch.setattr(workers._Worker, "tokenise", dies)
    with pytest.raises(DataError, match=r"a tokenising process ended early \(exit status -9\)"):
        build([str(source)], tmp_path / "out", ByteTokenizer(), workers=2)


@pytest.mark.parametrize("out", ["", ".", "/", ".."])
def test_a_folder_without_a_name_is_refused(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="is no folder that can be made"):
        build([str(tmp_path / "a.txt")], Path(out), ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
