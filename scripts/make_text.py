#!/usr/bin/env python3
"""Writes text of any size as jsonl, with duplicates, near duplicates, junk and broken lines, and says how many of each.

    python scripts/make_text.py --out corpus --size 3G
    jaxscale data build corpus --out tokens/corpus --deduplicate near --filters max-digit-share=0.5 --max-bad 100000

A document is lines drawn from Shakespeare (or from --lines FILE), 2,600 bytes on average. The same flags make the same
bytes. Of each 100 documents 5 are repeated exactly, 5 with 1 line in 40 replaced, 2 are tables of numbers; 1 line in
10,000 is broken (--broken).
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import numpy as np

LINES = Path(__file__).resolve().parent.parent / "recipes" / "data" / "shakespeare.jsonl.gz"
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
KEPT = 200
"""Documents back from which one is repeated."""


class Writer:
    """Documents one after the other; counts what it makes."""

    def __init__(self, lines: list[str], broken: float, seed: int) -> None:
        self._lines, self._broken = lines, broken
        self._rng = np.random.default_rng(seed)
        self._last: list[list[str]] = []
        self.counts = dict.fromkeys(("documents", "exact", "near", "numbers", "broken"), 0)

    def line(self) -> str:
        """The next document as a line of jsonl."""
        draw = self._rng.random()
        self.counts["documents"] += 1
        if self._broken and draw < self._broken:
            self.counts["broken"] += 1
            return '{"text": "broken off\n'
        draw = self._rng.random()
        if self._last and draw < 0.10:
            document = list(self._last[self._rng.integers(len(self._last))])
            if draw < 0.05:
                self.counts["exact"] += 1
            else:
                self.counts["near"] += 1
                for at in self._rng.integers(0, len(document), max(len(document) // 40, 1)):
                    document[at] = self._drawn(1)[0]
        elif draw < 0.12:
            self.counts["numbers"] += 1
            document = [" ".join(map(str, row)) for row in self._rng.integers(0, 10**6, (30, 12))]
        else:
            document = self._drawn(20 + int(self._rng.exponential(45)))
            self._last = [*self._last[-KEPT:], document]
        return json.dumps({"text": "\n".join(document)}) + "\n"

    def _drawn(self, count: int) -> list[str]:
        return [self._lines[at] for at in self._rng.integers(0, len(self._lines), count)]


def read_lines(path: Path) -> list[str]:
    """Lines that are no headings, of jsonl(.gz) or plain text."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    texts = [json.loads(line)["text"] for line in data.splitlines()] if ".jsonl" in path.name else [data.decode()]
    return [line for text in texts for line in text.splitlines() if len(line) > 20]


def write(out: Path, size: int, files: int, lines: list[str], broken: float, seed: int) -> dict[str, int]:
    """Writes about `size` bytes into `files` files of a new folder; returns the counts."""
    out.mkdir(parents=True)
    writer = Writer(lines, broken, seed)
    for number in range(files):
        written = 0
        with open(out / f"text-{number:05}-of-{files:05}.jsonl", "w", encoding="utf-8") as file:
            while written < size / files:
                written += file.write(writer.line())
    return writer.counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", required=True, help="bytes, with k, M or G for powers of 1,000")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--lines", type=Path, default=LINES, help="where lines are drawn from")
    parser.add_argument("--broken", type=float, default=0.0001, help="share of lines that are no JSON")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unit = args.size[-1:] if args.size[-1:] in UNITS else ""
    number = args.size.removesuffix(unit)
    if not number.replace(".", "", 1).isdecimal() or args.files < 1 or not 0 <= args.broken <= 1:
        parser.error("--size is a number with k, M or G, --files at least 1, --broken a share")
    if args.out.exists():
        parser.error(f"{args.out} is there already; delete it or give another --out")
    counts = write(
        args.out, int(float(number) * UNITS[unit]), args.files, read_lines(args.lines), args.broken, args.seed
    )
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size:,} bytes, {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
