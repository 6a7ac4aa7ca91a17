"""Input rate on one core: packed, shuffled batches with segment ids and positions, against raw memory-map windows.

    python scripts/bench/data.py [--tokens 26000000] [--sequence 2048] [--batch 8] [--rounds 9]

Both sides read the same shuffled windows of one corpus of about 660-token documents through Grain's `MapDataset`: the
reference stacks bare windows with `MapDataset.batch`, ours makes every array of a training batch. The sides alternate;
medians are printed, per second of processor time. The last line adds the background thread and the transfer to one
device, through the whole `Loader`, for information.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import grain
import jax
import numpy as np
import xxhash

from jaxscale import axes
from jaxscale.config import Config, DataConfig, ModelConfig
from jaxscale.data.batches import StepRows
from jaxscale.data.corpora import Corpora, open_corpora
from jaxscale.data.loader import Loader
from jaxscale.data.token_file import Header, header_text
from jaxscale.data.tokenizer import ByteTokenizer

TARGET_RATIO, TARGET_RATE = 0.5, 20.0


def write_corpus(folder: Path, tokens: int) -> None:
    """Random bytes as documents of exponentially distributed length."""
    rng = np.random.default_rng(0)
    lengths = rng.exponential(660, tokens // 660).astype(np.int64) + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    ids = rng.integers(0, 256, offsets[-1], dtype=np.uint16)
    ids[offsets[1:] - 1] = 256
    digest = xxhash.xxh3_128(ids)
    digest.update(offsets)
    folder.mkdir()
    ids.tofile(folder / "tokens.bin")
    offsets.tofile(folder / "documents.bin")
    (lengths - 1).astype("<i8").tofile(folder / "document_bytes.bin")
    header = Header(
        dtype="uint16",
        tokens=len(ids),
        documents=len(lengths),
        bytes=int((lengths - 1).sum()),
        vocabulary=257,
        largest_token=256,
        end_of_document=256,
        tokenizer_name=ByteTokenizer.name,
        tokenizer_hash=ByteTokenizer.hash,
        content=digest.hexdigest(),
        plan="",
        sources=(),
    )
    (folder / "header.json").write_text(header_text(header))


class RawWindows:
    """The least that a loader can do: window i of the memory map."""

    def __init__(self, path: Path, sequence: int) -> None:
        self._tokens, self._sequence = np.memmap(path, np.uint16, "r"), sequence

    def __len__(self) -> int:
        return (self._tokens.size - 1) // self._sequence

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._sequence
        return np.asarray(self._tokens[start : start + self._sequence + 1], np.int32)


def rate(read: Callable[[int], object], steps: range, tokens: int) -> float:
    """Million tokens per second of processor time, which other programs on the machine disturb less than the clock."""
    start = time.process_time()
    for step in steps:
        read(step)
    return len(steps) * tokens / (time.process_time() - start) / 1e6


def loader_rate(config: Config, corpora: Corpora, mesh: jax.sharding.Mesh, steps: range, tokens: int) -> float:
    with Loader(config, corpora, mesh, steps.start) as loader:
        return rate(lambda _: jax.block_until_ready(next(loader).batch), steps, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 26_000_000), ("sequence", 2048), ("batch", 8), ("rounds", 9), ("steps", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "corpus"
        write_corpus(folder, options.tokens)
        data = DataConfig(path=str(folder), sequence=options.sequence, batch=options.batch)
        config = Config("bench", ModelConfig(), steps=10**9, data=data)
        corpora = open_corpora(config)
        mesh = jax.make_mesh((1,) * len(axes.AXES), axes.AXES, devices=jax.devices()[:1])
        raw = grain.MapDataset.source(RawWindows(folder / "tokens.bin", options.sequence))
        reference = raw.shuffle(seed=0).repeat(None).batch(options.batch)
        ours = grain.MapDataset.source(StepRows(config, corpora.by_address, mesh, mesh.local_devices))
        tokens = options.batch * options.sequence
        rates: dict[str, list[float]] = {"reference": [], "ours": [], "loader": []}
        for number in range(options.rounds + 1):
            steps = range(number * options.steps, (number + 1) * options.steps)
            measured = {
                "reference": rate(reference.__getitem__, steps, tokens),
                "ours": rate(ours.__getitem__, steps, tokens),
                "loader": loader_rate(config, corpora, mesh, steps, tokens),
            }
            for name, value in measured.items():
                rates[name] += [value] * (number > 0)  # the first round warms the page cache
    median = {name: statistics.median(values) for name, values in rates.items()}
    ratio = median["ours"] / median["reference"]
    print(
        f"sequence {options.sequence}, batch {options.batch}, one core, medians of {options.rounds} alternating rounds"
    )
    print(f"packed batches            {median['ours']:7.1f} M tokens/s   (to reach: {TARGET_RATE:.0f})")
    print(f"raw windows (reference)   {median['reference']:7.1f} M tokens/s")
    print(f"ratio                     {ratio:7.2f}              (to reach: {TARGET_RATIO})")
    print(f"through the whole loader  {median['loader']:7.1f} M tokens/s")


if __name__ == "__main__":
    main()
