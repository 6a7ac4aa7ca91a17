"""The held-out documents as batches: every token of them once, the last window of each corpus filled with weight 0.

Read next: `train/evaluate.py`, which makes figures of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from jax.sharding import Mesh

from jaxscale import axes
from jaxscale.config import Config
from jaxscale.data.batches import check_divides, fill, needed_rows
from jaxscale.data.corpora import Corpora
from jaxscale.data.corpus import Stream
from jaxscale.data.loader import Batch, to_devices
from jaxscale.data.rows import Rows, empty_rows, join_rows, make_rows


@dataclass(frozen=True)
class HeldOut:
    """How much is held out, over all corpora."""

    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """Predicted tokens: all but the first of each document, its end-of-document token included."""

    @property
    def bytes_per_token(self) -> float:
        """Divides a mean loss per token into a loss per byte; exact when all batches were evaluated."""
        return self.bytes / self.tokens if self.tokens else 0.0


def held_out(corpora: Corpora) -> HeldOut:
    """Counts of what `evaluation_batches` covers; zeros when nothing is held out."""
    streams = _streams(corpora)
    documents = sum(stream.documents for stream in streams)
    tokens = sum(stream.length for stream in streams) - documents
    return HeldOut(documents, sum(stream.bytes for stream in streams), tokens)


def evaluation_batches(config: Config, corpora: Corpora, mesh: Mesh) -> Iterator[Batch]:
    """Batches of `data.batch` rows of `data.sequence` tokens over all held-out documents, as a `Loader` makes them.

    Phases do not change them, so that figures compare over a whole run. `evaluate.batches` takes the first ones only.
    """
    sequence, batch = config.data.sequence, config.data.batch
    check_divides(sequence, mesh)
    streams = _streams(corpora)
    windows = [-(-max(stream.length - 1, 0) // sequence) for stream in streams]
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(windows, dtype=np.int64)])
    total = int(first[-1])
    padded = axes.padded_batch(batch, config.train.microbatches, axes.batch_shards(mesh.shape))
    wanted = needed_rows(mesh, padded, mesh.local_devices)

    def read(row: np.ndarray) -> Rows:
        source = np.searchsorted(first, row, "right") - 1
        return join_rows(
            [
                _read(streams[s], int(w), sequence, row[i : i + 1])
                for i, (s, w) in enumerate(zip(source, row - first[source], strict=True))
            ]
        )

    batches = -(-total // batch)
    for number in range(min(batches, config.evaluate.batches or batches)):
        start = number * batch
        rows = fill(wanted, min(batch, total - start), start, partial(empty_rows, sequence), read)
        yield to_devices(rows, mesh, padded)


def _read(stream: Stream, window: int, sequence: int, row: np.ndarray) -> Rows:
    """One row; a last window that is not full is filled with token 0, segment 0 and weight 0."""
    start = window * sequence
    length = min(sequence + 1, stream.length - start)
    tokens, starts = stream.gather(np.array([start]), length)
    missing = ((0, 0), (0, sequence + 1 - length))
    rows = make_rows(np.pad(tokens, missing), np.pad(starts, missing), row)
    for name in ("loss_weight", "segment_ids", "positions"):
        rows[name][:, length - 1 :] = 0
    return rows


def _streams(corpora: Corpora) -> list[Stream]:
    return [corpus.held_out for corpus in corpora.by_address.values() if corpus.held_out is not None]
