"""Batches on the devices, step by step, prepared ahead in the background.

The batch of step n depends on the config and n alone, so a loader starts at any step and a resume needs no more than
the number of the step. Each process reads only the rows its own devices hold. Read next: `evaluation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.config import Config
from jaxscale.data.batches import SPECS, needed_rows
from jaxscale.data.rows import Rows
from jaxscale.data.source import Source

if TYPE_CHECKING:
    from grain import DatasetIterator  # type: ignore[import-untyped]  # no stubs

Batch = dict[str, jax.Array]


class Step(NamedTuple):
    """One element of a `Loader`."""

    step: int
    """Number of the step, 0 = the first of the run."""
    row: int
    """First global row of the batch; after the step the position is `row + rows`."""
    rows: int
    """Rows of the batch, without padding."""
    batch: Batch
    """Of text: tokens, targets, segment_ids, positions: (B, S) int32, and loss_weight: (B, S) float32, all sharded
    P((data, fsdp, expert), context); row: (B,) uint32, global row modulo 2^32, sharded P((data, fsdp, expert)).
    B = `axes.padded_batch(rows, microbatches, shards)`; padding rows come last and have loss_weight 0."""


class Loader:
    """Iterates over the steps from `start_step` to the end of the run. Close it, or use it in a `with`."""

    def __init__(self, config: Config, source: Source, mesh: Mesh, start_step: int = 0) -> None:
        """Starts to read ahead `config.data.prefetch` batches in one background thread."""
        import grain

        self._mesh = mesh
        self._rows = source.step_rows(config, mesh, mesh.local_devices)
        self._step = start_step
        # The thread makes NumPy arrays only: JAX stays in the caller's thread, where a transfer does not block either.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.data.prefetch)
        self._iterator: DatasetIterator[Rows] = iter(grain.MapDataset.source(self._rows).to_iter_dataset(options))
        if start_step < len(self._rows):
            self._iterator.set_state({"next_index": start_step})
            self._iterator.start_prefetch()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Step:
        """Raises what went wrong in the background, StopIteration after the run's last step or after `close`."""
        step = self._step
        if step >= len(self._rows):
            raise StopIteration
        try:
            rows = next(self._iterator)
        except BaseException:
            # An iterator that failed would go on with the step after: a row skipped in silence.
            self.close()
            raise
        self._step = step + 1
        row, count = self._rows.span(step)
        return Step(step, row, count, to_devices(rows, self._mesh, self._rows.padded(step), self._rows.specs))

    def close(self) -> None:
        """Stops reading ahead. May be called more than once."""
        self._step = len(self._rows)
        self._iterator.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to_devices(rows: Rows, mesh: Mesh, padded: int, specs: Mapping[str, P] = SPECS) -> Batch:
    """Global arrays of `padded` rows from the rows that this process's devices hold, in the order of `needed_rows`.

    specs: of each array; those of text where nothing is said.
    """
    shardings = {name: NamedSharding(mesh, specs[name]) for name in rows}
    if mesh.is_multi_process:
        return _assemble(rows, padded, needed_rows(mesh, padded, mesh.local_devices), shardings)
    return jax.device_put(rows, shardings)


def _assemble(rows: Rows, padded: int, here: np.ndarray, shardings: Mapping[str, NamedSharding]) -> Batch:
    """`here`: which places of the batch `rows` holds. One transfer for all shards of all arrays."""
    shards: list[np.ndarray] = []
    targets: list[jax.Device] = []
    for name, value in rows.items():
        shape = (padded, *value.shape[1:])
        places = cast(Mapping[jax.Device, tuple[slice, ...]], shardings[name].addressable_devices_indices_map(shape))
        for device, place in places.items():
            first, stop, _ = place[0].indices(padded)
            start = int(np.searchsorted(here, first))
            shards.append(value[(slice(start, start + stop - first), *place[1:])])
            targets.append(device)
    arrays = iter(jax.device_put(shards, targets))
    count = len(targets) // len(rows)
    return {
        name: jax.make_array_from_single_device_arrays(
            (padded, *value.shape[1:]), shardings[name], [next(arrays) for _ in range(count)]
        )
        for name, value in rows.items()
    }
