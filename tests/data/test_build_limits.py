"""What a build takes of a machine: memory that does not grow with the corpus, and every core."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from data_samples import make_texts, write_jsonl  # beside this file

from jaxscale.commands.data import read
from jaxscale.data import build as build_module
from jaxscale.data.build import BLOCK_BYTES, build

MIB = 1 << 20
BUILD = """
import sys
from jaxscale.data.build import build
from jaxscale.data.tokenizer import load_tokenizer
file = build(sys.argv[1:2], sys.argv[2], load_tokenizer("bytes"), workers=1)
with open("/proc/self/status") as status:
    print(file.header.bytes, *(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
"""Prints the bytes of text and the most KiB of memory that the process had; `ru_maxrss` would be that of its parent."""


def write(path, size):
    """Documents of 1,000 bytes each, `size` bytes of text in all."""
    texts = (f"{number:09} " * 100 for number in range(size // 1000))
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            while some := [text for text, _ in zip(texts, range(4000), strict=False)]:
                writer.write_table(pa.table({"text": some}))
        return
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(lines)
    else:
        with open(path, "w") as file:
            file.writelines(lines)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells the peak of a process alone")
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, ending):
    """The input, or its tokens, kept in memory would add 56 MB and 112 MB."""
    small, large = 8_000_000, 64_000_000
    assert large > 10 * BLOCK_BYTES
    peaks = {}
    for size in (small, large):
        write(tmp_path / f"{size}.{ending}", size)
        command = [sys.executable, "-c", BUILD, str(tmp_path / f"{size}.{ending}"), str(tmp_path / str(size))]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert result.returncode == 0, result.stderr
        found, peaks[size] = map(int, result.stdout.split())
        assert size * 0.99 < found <= size
    assert peaks[large] - peaks[small] < 24_000, peaks


def test_a_large_input_is_tokenised_on_every_core_and_a_small_one_here(tmp_path, monkeypatch, byte_tokenizer):
    used = []

    def tokenise_all(blocks, tokenizer, folder, text_field, workers):
        used.append(workers)
        return original(blocks, tokenizer, folder, text_field, 1)

    original = build_module.tokenise_all
    monkeypatch.setattr(build_module, "tokenise_all", tokenise_all)
    monkeypatch.setattr(build_module, "WORTH_PROCESSES", 2000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 7}, raising=False)
    small = write_jsonl(tmp_path / "small.jsonl", ["Once more"])
    large = write_jsonl(tmp_path / "large.jsonl", make_texts(50))
    assert small.stat().st_size < 2000 < large.stat().st_size
    for number, (path, asked) in enumerate([(small, 0), (large, 0), (small, 3), (large, 3), (large, 1)]):
        build([str(path)], tmp_path / str(number), byte_tokenizer, workers=asked)
    assert used == [1, 5, 3, 3, 1]
    assert read(["a.jsonl", "--out", "tokens"]).workers == 0, "what the command asks for unless told otherwise"
