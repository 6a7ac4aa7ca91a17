"""The rows of a step that one process needs, as NumPy arrays: a pure function of (config, corpora, step, devices).

A batch has the same rows in the same order in every world; a world whose devices do not divide it gets rows of weight 0
at the end. Legend: B rows on the devices, S tokens per row. Read next: `loader.py`, which puts them on the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.config import Config
from jaxscale.data.corpus import Corpus, Stream
from jaxscale.data.errors import DataError
from jaxscale.data.mixture import make_references, source_seed
from jaxscale.data.position import Phase, phase_at_step, phases, row_at_step
from jaxscale.data.rows import Rows, empty_rows, join_rows, make_rows
from jaxscale.data.source import Layout, RowArray

if TYPE_CHECKING:
    import grain  # type: ignore[import-untyped]  # no stubs

TOKEN_SPEC = P(axes.BATCH_AXES, "context")
"""Of (B, S) arrays."""
ROW_SPEC = P(axes.BATCH_AXES)
"""Of the (B,) array `row`."""


SPECS = {
    **dict.fromkeys(("tokens", "targets", "segment_ids", "positions", "loss_weight"), TOKEN_SPEC),
    "row": ROW_SPEC,
}
"""Of rows of text."""


def text_layout(sequence: int) -> Layout:
    """The arrays of a batch of text."""
    one = empty_rows(sequence, np.zeros(1, np.int64))
    return {name: RowArray(value.shape[1:], value.dtype.name, SPECS[name]) for name, value in one.items()}


class References:
    """Which stream and window each global row is, over all phases of a run."""

    def __init__(self, config: Config, corpora: Mapping[str, Corpus]) -> None:
        """`corpora`: by address. Raises DataError when a corpus is shorter than one sequence."""
        self._config, self._corpora = config, corpora
        self._table = phases(config)
        self._made: dict[Phase, tuple[grain.MapDataset[int], list[Stream], np.ndarray]] = {}
        for phase in self._table:
            for source in phase.sources:
                corpora[source.path].check_sequence(phase.sequence)

    @property
    def table(self) -> tuple[Phase, ...]:
        return self._table

    def rows(self, phase: Phase, row: np.ndarray) -> Rows:
        """The rows with these global ids, all within `phase`."""
        dataset, streams, first = self._phase(phase)
        window = np.array([dataset[r] for r in (row - phase.row).tolist()], np.int64)
        source = np.searchsorted(first, window, "right") - 1
        return read_windows(streams, source, window - first[source], phase.sequence, row)

    def _phase(self, phase: Phase) -> tuple[grain.MapDataset[int], list[Stream], np.ndarray]:
        if phase not in self._made:
            used = [self._corpora[source.path] for source in phase.sources]
            windows = [corpus.train.windows(phase.sequence) for corpus in used]
            seeds = [source_seed(self._config.seed, corpus.content, phase.generation) for corpus in used]
            dataset = make_references(windows, seeds, phase.proportions, self._config.data.shuffle)
            first = np.concatenate([np.zeros(1, np.int64), np.cumsum(windows)[:-1]])
            self._made[phase] = (dataset, [corpus.train for corpus in used], first)
        return self._made[phase]


def read_windows(
    streams: Sequence[Stream], source: np.ndarray, window: np.ndarray, sequence: int, row: np.ndarray
) -> Rows:
    """Rows from windows (B,) of streams number `source` (B,)."""
    if len(streams) == 1:
        return make_rows(*streams[0].gather(window * sequence, sequence + 1), row)
    tokens = np.empty((len(row), sequence + 1), np.int32)
    starts = np.empty((len(row), sequence + 1), bool)
    for number in np.unique(source):
        mine = source == number
        tokens[mine], starts[mine] = streams[number].gather(window[mine] * sequence, sequence + 1)
    return make_rows(tokens, starts, row)


class StepRows:
    """Random access by step: element n = the rows of step n that some devices need. A source for Grain."""

    def __init__(
        self, config: Config, corpora: Mapping[str, Corpus], mesh: Mesh, devices: Collection[jax.Device]
    ) -> None:
        self._references = References(config, corpora)
        self._mesh, self._devices = mesh, devices
        self._microbatches = config.train.microbatches
        self._steps = config.steps
        self._wanted: dict[int, np.ndarray] = {}  # by rows of the batch
        for phase in self._references.table:
            check_divides(phase.sequence, mesh)

    @property
    def specs(self) -> Mapping[str, P]:
        return SPECS

    def __len__(self) -> int:
        return self._steps

    def span(self, step: int) -> tuple[int, int]:
        """First global row of the step, and how many rows it has."""
        return row_at_step(self._references.table, step), phase_at_step(self._references.table, step).batch

    def padded(self, step: int) -> int:
        """Rows of the step's arrays on the devices."""
        return self._padded(phase_at_step(self._references.table, step).batch)

    def __getitem__(self, step: int) -> Rows:
        phase = phase_at_step(self._references.table, step)
        first = row_at_step(self._references.table, step)
        if phase.batch not in self._wanted:
            self._wanted[phase.batch] = needed_rows(self._mesh, self._padded(phase.batch), self._devices)
        return fill(
            self._wanted[phase.batch],
            phase.batch,
            first,
            partial(empty_rows, phase.sequence),
            lambda row: self._references.rows(phase, row),
        )

    def _padded(self, batch: int) -> int:
        return axes.padded_batch(batch, self._microbatches, axes.batch_shards(self._mesh.shape))


def fill(
    wanted: np.ndarray,
    rows: int,
    first: int,
    empty: Callable[[np.ndarray], Rows],
    read: Callable[[np.ndarray], Rows],
) -> Rows:
    """Places `wanted` of a batch: those below `rows` are read by their global ids, the rest is padding (`empty`)."""
    real = wanted[wanted < rows]
    parts = [read(first + real)] if len(real) else []
    if len(real) < len(wanted):
        parts.append(empty(first + wanted[len(real) :]))
    return join_rows(parts)


def needed_rows(mesh: Mesh, padded: int, devices: Collection[jax.Device]) -> np.ndarray:
    """Places in a batch of `padded` rows that these devices hold, in growing order."""
    places = NamedSharding(mesh, ROW_SPEC).devices_indices_map((padded,))
    spans = {places[device][0].indices(padded)[:2] for device in devices}
    return np.unique(np.concatenate([np.arange(*span) for span in spans]))


def check_divides(sequence: int, mesh: Mesh) -> None:
    """Raises DataError when the mesh axis `context` does not divide the sequence."""
    context = mesh.shape["context"]
    if sequence % context:
        raise DataError(
            f"mesh axis 'context' ({context}) does not divide a sequence of {sequence} tokens; "
            f"use data.sequence {sequence // context * context or context} or another mesh.context"
        )
