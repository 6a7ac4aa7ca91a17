"""One document is tokenised as a whole; one so large that memory may not do is refused by name."""

import gzip
import json

import pytest

from jaxscale.data import sources
from jaxscale.data.build import build
from jaxscale.data.errors import DataError
from jaxscale.data.tokenizer import ByteTokenizer

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def _limit(monkeypatch):
    assert sources.LARGEST_DOCUMENT == 1 << 26
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT", LIMIT)


def parquet(path, text):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["short", text.decode()]}), path)


WRITERS = {
    "a.txt": lambda path, text: path.write_bytes(text),
    "a.txt.gz": lambda path, text: path.write_bytes(gzip.compress(text)),
    "a.jsonl": lambda path, text: path.write_text('{"text": "x"}\n' + json.dumps({"text": text.decode()}) + "\n"),
    "a.parquet": parquet,
}
WHERE = {"a.txt": r"a\.txt", "a.txt.gz": r"a\.txt\.gz", "a.jsonl": r"a\.jsonl:2", "a.parquet": r"a\.parquet, row 2"}


@pytest.mark.parametrize("name", WRITERS)
def test_the_limit(tmp_path, name):
    path, room = tmp_path / name, len('{"text": ""}\n') if name == "a.jsonl" else 0
    WRITERS[name](path, b"y" * (LIMIT - room))
    assert build([str(path)], tmp_path / "good", ByteTokenizer(), block_bytes=10).header.tokens >= LIMIT - room
    WRITERS[name](path, b"y" * (LIMIT + 11))
    message = WHERE[name] + r" is one document of more than 1 MiB.* split it into documents: .*split -C 1m"
    with pytest.raises(DataError, match=message):
        build([str(path)], tmp_path / "bad", ByteTokenizer(), block_bytes=10)
    assert not (tmp_path / "bad").exists()


def test_many_small_ones_are_no_large_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some words"}\n' * (4 * LIMIT // 22))
    assert build([str(path)], tmp_path / "out", ByteTokenizer()).header.documents == 4 * LIMIT // 22
