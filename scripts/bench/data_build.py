"""Rate of `data build` against the tokenizer library alone, and the memory that a build takes, on generated text.

    python scripts/bench/data_build.py [--size 60M] [--rounds 3] [--tokenizer TOKENIZER.json]

Rows: `byte-level` is a tokenizer.json with an id for each byte and no merges, `BPE` one with 8,192 ids trained on part
of the text (or --tokenizer), `bytes` the built-in one, for information: it does so little that reading JSON is most of
the work. The reference encodes the same texts, held in memory, with `encode_batch_fast` and the library's own threads,
and puts the ids into arrays. A build reads jsonl, uses a process per core, and leaves a token folder with its digests.
Sides alternate, each in a process of its own, timed from its first text to its last (the start of processes counts);
medians are printed. The last rows are builds that also filter and look for duplicates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = 0.8

REFERENCE = """
import json, sys, time
import numpy as np
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
texts = [json.loads(line)["text"] for line in open(sys.argv[1])]
size, start = sum(len(text.encode()) for text in texts), time.perf_counter()
for first in range(0, len(texts), 1000):
    for encoding in tokenizer.encode_batch_fast(texts[first:first + 1000], add_special_tokens=False):
        np.array(encoding.ids, np.uint16)
print(size / (time.perf_counter() - start) / 1e6, 0)
"""
BUILD = """
import json, re, sys, time
from jaxscale.data.build import build
from jaxscale.data.filters import parse_filters
from jaxscale.data.selection import Selection
from jaxscale.data.tokenizer import load_tokenizer
source, out, tokenizer, selection = sys.argv[1:]
filters, deduplicate = json.loads(selection)
tokenizer, selection = load_tokenizer(tokenizer), Selection(filters=parse_filters(filters), deduplicate=deduplicate)
start = time.perf_counter()
build([source], out, tokenizer, selection=selection)
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(SIZE / seconds / 1e6, int(peak) / 1024)
"""
FILTERS = ["min-characters=50", "max-digit-share=0.5", "max-symbol-share=0.4", "max-repeated-lines=0.7"]


def call(code: str, *arguments: object) -> tuple[float, float]:
    """MB of text per second, and the peak of the process's memory in MiB where it is told."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rate, peak = map(float, result.stdout.split())
    return rate, peak


def make_tokenizers(folder: Path, source: Path, given: str) -> dict[str, str]:
    """Paths by name of the row."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def trained(vocabulary: int, texts: list[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    with open(source) as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(2000), strict=False)]
    trained(257, texts).save(str(folder / "byte_level.json"))
    if not given:
        trained(8192, texts).save(str(folder / "bpe.json"))
    return {"byte-level": str(folder / "byte_level.json"), "BPE": given or str(folder / "bpe.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M", help="of the text, with k, M or G")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="", help="a tokenizer.json for the row BPE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make = [sys.executable, str(ROOT / "scripts" / "make_text.py"), "--out", str(folder / "text")]
        subprocess.run([*make, "--size", options.size, "--files", "1", "--broken", "0"], check=True)
        (source,) = (folder / "text").iterdir()
        with open(source) as lines:
            size = sum(len(json.loads(line)["text"].encode()) for line in lines)
        code = BUILD.replace("SIZE", str(size))
        numbers = iter(range(10**6))

        def build(tokenizer: str, filters: list[str], deduplicate: str) -> tuple[float, float]:
            out = folder / f"out{next(numbers)}"
            measured = call(code, source, out, tokenizer, json.dumps([filters, deduplicate]))
            subprocess.run(["rm", "-r", str(out)], check=True)
            return measured

        print(f"{size:,} bytes of text, {len(os.sched_getaffinity(0))} cores, medians of {options.rounds} rounds, MB/s")
        print(f"{'tokenizer':<12} {'library':>9} {'build':>9} {'ratio':>7} {'peak MiB':>9}   (to reach: {TARGET})")
        tokenizers = make_tokenizers(folder, source, options.tokenizer)
        for name, path in tokenizers.items():
            library, ours, peaks = [], [], []
            for _ in range(options.rounds):
                library.append(call(REFERENCE, source, path)[0])
                rate, peak = build(path, [], "none")
                ours.append(rate)
                peaks.append(peak)
            middle = statistics.median(library), statistics.median(ours)
            print(
                f"{name:<12} {middle[0]:9.1f} {middle[1]:9.1f} {middle[1] / middle[0]:7.2f} {max(peaks):9.0f}",
                flush=True,
            )
        print("with `bytes`:")
        for what, filters, deduplicate in (
            ("every document", [], "none"),
            ("four filters", FILTERS, "none"),
            ("exact duplicates", [], "exact"),
            ("near duplicates", [], "near"),
        ):
            measured = [build("bytes", filters, deduplicate) for _ in range(options.rounds)]
            rate, peak = statistics.median(rate for rate, _ in measured), max(peak for _, peak in measured)
            print(f"  {what:<20} {rate:9.1f} {'':7} {peak:9.0f}", flush=True)


if __name__ == "__main__":
    main()
