"""Records that cannot be used: set aside with their place, counted, up to a bound."""

import gzip
import json
import os

import pytest
from data_samples import make_texts, write_jsonl  # beside this file

from jaxscale.data.build import build
from jaxscale.data.ensure import ensure_built
from jaxscale.data.errors import DataError
from jaxscale.data.manifest import load_manifest

GOOD = b'{"text": "good"}\n'
BAD = {
    2: b"{'text': 3}\n",
    4: b'{"body": "x"}\n',
    5: b'{"text": 3}\n',
    9: b'{"text": "caf\xe9"}\n',
    12: b'{"text": "\\ud800"}\n',
    13: b"[1]\n",
}


@pytest.fixture(name="source")
def _source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(BAD.get(number, GOOD) for number in range(1, 16)))
    return str(path)


def quarantine(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("block", [20, 1 << 20])
def test_bad_records_are_set_aside_by_their_line(source, tmp_path, byte_tokenizer, workers, block):
    file = build([source], tmp_path / "out", byte_tokenizer, max_bad=6, workers=workers, block_bytes=block)
    assert file.header.documents == 9
    lines = quarantine(file.folder)
    assert [line["record"] for line in lines] == list(BAD)
    assert all(
        line["input"] == 0 and line["lost"] == 0 and f"a.jsonl:{line['record']}" in line["why"] for line in lines
    )
    total = load_manifest(file.folder)["total"]
    assert (total["documents"], total["quarantined"], total["lost"]) == (9, 6, 0)
    file.verify()


def test_one_more_than_allowed_ends_the_build_and_a_larger_bound_goes_on(source, tmp_path, byte_tokenizer):
    reference = build([source], tmp_path / "reference", byte_tokenizer, max_bad=6)
    options = {"block_bytes": 20, "commit_seconds": 0}
    with pytest.raises(DataError, match=r"more than 5 records cannot be used.*a\.jsonl:13: .*with a larger --max-bad"):
        build([source], tmp_path / "out", byte_tokenizer, max_bad=5, **options)
    assert not (tmp_path / "out").exists()
    journal = json.loads((tmp_path / "out.building" / "journal.json").read_text())
    assert (journal["documents"], journal["quarantined"]) == (7, 5)
    file = build([source], tmp_path / "out", byte_tokenizer, max_bad=6, **options)
    for name in ("tokens.bin", "documents.bin", "header.json", "manifest.json", "quarantine.jsonl"):
        assert (file.folder / name).read_bytes() == (reference.folder / name).read_bytes(), name
    with pytest.raises(DataError, match=r"built without 6 bad records .*quarantine\.jsonl.* more than 5 \(--max-bad\)"):
        build([source], tmp_path / "out", byte_tokenizer, max_bad=5)
    assert build([source], tmp_path / "out", byte_tokenizer, max_bad=6).header == file.header


def test_none_is_allowed_by_itself(source, tmp_path, byte_tokenizer):
    with pytest.raises(DataError, match=r"^\S*a\.jsonl:2: not valid JSON"):
        build([source], tmp_path / "out", byte_tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        ensure_built(source, byte_tokenizer)


@pytest.mark.parametrize("block", [100, 1 << 20])
def test_a_file_that_breaks_off_costs_its_rest(tmp_path, byte_tokenizer, block):
    texts = make_texts(400, longest=400)
    data = gzip.compress(write_jsonl(tmp_path / "plain", texts).read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "b.jsonl.gz").write_bytes(data)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"gone")[:-9])
    (tmp_path / "d.txt").write_bytes(b"the end")
    paths = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl.gz", "c.txt.gz", "d.txt")]
    file = build(paths, tmp_path / "out", byte_tokenizer, max_bad=2, block_bytes=block)
    first, second, third, last = load_manifest(file.folder)["parents"]
    assert 200 < first["documents"] < 320
    assert (second["documents"], last["documents"]) == (400, 1)
    assert [parent["quarantined"] for parent in (first, second, third, last)] == [1, 0, 1, 0]
    assert first["lost"] > 0
    assert third["lost"] == (tmp_path / "c.txt.gz").stat().st_size
    broken = quarantine(file.folder)[0]
    assert broken["record"] == first["documents"] + 1, "the first line that is lost"
    assert "a.jsonl.gz is not a whole gzip file" in broken["why"]
    tokens = [
        byte_tokenizer.decode(file.tokens[a : b - 1]) for a, b in zip(file.offsets, file.offsets[1:], strict=False)
    ]
    assert tokens == [*texts[: first["documents"]], *texts, "the end"]


def test_parquet_rows_of_the_wrong_kind(tmp_path, byte_tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c", None, "e"]}), path, row_group_size=2)
    file = build([str(path)], tmp_path / "out", byte_tokenizer, max_bad=2)
    assert [line["record"] for line in quarantine(file.folder)] == [2, 4]
    assert file.header.documents == 3


def test_the_list_has_the_order_of_the_input(tmp_path, byte_tokenizer):
    """Some are seen where the file is read, some where the text is decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [b"a", b"\xff", None, b"b\xff", None, b"c"]}), path)
    file = build([str(path)], tmp_path / "out", byte_tokenizer, max_bad=4)
    assert [line["record"] for line in quarantine(file.folder)] == [2, 3, 4, 5]


def test_a_document_that_is_too_large_is_one_record(tmp_path, byte_tokenizer, monkeypatch):
    from jaxscale.data import sources

    monkeypatch.setattr(sources, "LARGEST_DOCUMENT", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "x" * 5000, "three", "y" * 3_000_000, "five"])
    file = build([str(path)], tmp_path / "out", byte_tokenizer, max_bad=2, block_bytes=10)
    assert [line["record"] for line in quarantine(file.folder)] == [2, 4]
    assert file.header.bytes == len("onethreefive")


def test_a_read_error_is_told(tmp_path, byte_tokenizer, monkeypatch):
    """What a disk that fails gives: the input is left where it broke off."""
    import errno

    from jaxscale.data import reading

    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    (tmp_path / "b.txt").write_text("good")
    real, calls = reading._read_whole_lines, []

    def fails(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(reading, "_read_whole_lines", fails)
    paths = [str(source), str(tmp_path / "b.txt")]
    file = build(paths, tmp_path / "out", byte_tokenizer, max_bad=1, block_bytes=500)
    first, last = load_manifest(file.folder)["parents"]
    assert 0 < first["documents"] < 50
    assert (first["quarantined"], last["documents"]) == (1, 1)
    assert "Input/output error" in quarantine(file.folder)[0]["why"]
    calls.clear()
    with pytest.raises(DataError, match=r"cannot be read .*Input/output error"):
        build(paths, tmp_path / "other", byte_tokenizer, block_bytes=500)


def test_an_input_that_changes_while_it_is_read(tmp_path, byte_tokenizer, monkeypatch):
    from jaxscale.data import build as module

    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))

    def touched(*arguments, real=module.read_blocks):
        yield from real(*arguments)
        os.utime(source, (1, 1))

    monkeypatch.setattr(module, "read_blocks", touched)
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read"):
        build([str(source)], tmp_path / "out", byte_tokenizer)
