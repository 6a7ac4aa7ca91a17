"""A table larger than the devices: all rows in the host's memory, the rows used most often in a cache on the devices.

Before a step its ids are looked at: rows that are not in the cache come in, and the rows used least often so far, none
of them of this batch, go back to the host with what the step before made of them. The step then sees a small row-wise
table and the batch's ids as places in it: lookups, updates and their results are those of a whole table (`table.py`).

One process; a trainer's step does not call it yet. Read next: `table.py`. Legend: R rows of the whole table, C of the
cache, D width, M rows moved at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.optim.sparse import SparseRule
from jaxscale.parallel.exchange import OWNERS
from jaxscale.parallel.table import make_groups
from jaxscale.parallel.table_layout import Bags, Feature, padded_rows, stripe_rows

NOWHERE = -1
SMALLEST_MOVE = 64
"""Rows are moved in numbers of this times a power of two: a handful of programs serve all steps."""


class CacheTooSmall(ValueError):
    """A batch has more distinct ids than the cache has rows."""


class ColdTable:
    """Weights (R, D) and, where the rule has one, an accumulator (R,) or (R, D), float32, with a cache of some rows.

    `device`: the arrays of the cache, {"weights": ..., "accumulator": ...}, to be looked up and updated by `group`; put
    back what an update returned. `moved`: rows that came in so far. Call it inside `jax.set_mesh`.
    """

    def __init__(
        self, weights: np.ndarray, rule: SparseRule, cache: int, *, hots: int, pooling: Literal["sum", "mean"] = "sum"
    ) -> None:
        """weights: (R, D) float32, kept and changed in place. cache: rows, at least the distinct ids of any batch."""
        self.rows, width = weights.shape
        self.cache = min(cache, self.rows)
        (self.group,), _ = make_groups(
            ("row",),
            Bags((Feature(self.cache, hots),)),
            width=width,
            pooling=pooling,
            bins=1,
            factor=0.0,
            compute=jnp.float32,
        )
        dims = rule.slot_dims()
        self._host: dict[str, np.ndarray] = {"weights": weights}
        names: dict[str, tuple[str | None, ...]] = {"weights": self.group.parameter.axes}
        if dims is not None:
            self._host["accumulator"] = np.zeros(weights.shape[:dims], np.float32)
            names["accumulator"] = self.group.slot_axes(dims)
        total = padded_rows(self.cache)
        self._specs = {name: axes.spec(*own) for name, own in names.items()}
        self.device: dict[str, jax.Array] = {
            name: jnp.zeros((total, *whole.shape[1:]), jnp.float32, out_sharding=self._specs[name])
            for name, whole in self._host.items()
        }
        self._place = np.full(self.rows, NOWHERE, np.int32)
        """Place in the cache of each row."""
        self._row = np.full(self.cache, NOWHERE, np.int64)
        """Row at each place."""
        self._uses = np.zeros(self.rows, np.int64)
        """How many ids of all batches each row was."""
        self.moved = 0

    def prepare(self, ids_BH: np.ndarray) -> np.ndarray:
        """Brings in what the batch needs. Returns the ids as places in the cache, int32; negative ids stay as they are.

        Raises CacheTooSmall, before anything is moved.
        """
        wanted, counts = np.unique(ids_BH[ids_BH >= 0], return_counts=True)
        if len(wanted) > self.cache:
            raise CacheTooSmall(
                f"the batch has {len(wanted):,} distinct ids, the cache {self.cache:,} rows; give it that many at "
                "least, or use smaller batches"
            )
        self._uses[wanted] += counts
        missing = wanted[self._place[wanted] == NOWHERE]
        if len(missing):
            self._bring_in(missing, wanted)
        return np.where(ids_BH >= 0, self._place[np.maximum(ids_BH, 0)], -1).astype(np.int32)

    def _bring_in(self, missing: np.ndarray, wanted: np.ndarray) -> None:
        is_needed = np.zeros(self.cache, bool)
        here = self._place[wanted]
        is_needed[here[here != NOWHERE]] = True
        # Free places first, then those of the rows used least; of equals the first.
        uses = np.where(self._row == NOWHERE, -1, self._uses[np.maximum(self._row, 0)])
        uses = np.where(is_needed, np.iinfo(np.int64).max, uses)
        places = np.argsort(uses, kind="stable")[: len(missing)]
        self._write_back(places[self._row[places] != NOWHERE])
        self._place[self._row[places][self._row[places] != NOWHERE]] = NOWHERE
        self._row[places], self._place[missing] = missing, places
        at = self._positions(places)
        for name, whole in self._host.items():
            values = _padded(whole[missing], len(at))
            self.device[name] = _store(self._specs[name], self.device[name], at, values)
        self.moved += len(missing)

    def _write_back(self, places: np.ndarray) -> None:
        """The host gets the rows at these places as they are on the devices."""
        if not len(places):
            return
        at = self._positions(places)
        for name, whole in self._host.items():
            whole[self._row[places]] = np.asarray(_load(self._specs[name], self.device[name], at))[: len(places)]

    def _positions(self, places: np.ndarray) -> np.ndarray:
        """Rows of the arrays on the devices, filled up with rows that are none."""
        total = padded_rows(self.cache)
        size = SMALLEST_MOVE
        while size < len(places):
            size *= 2
        return _padded(stripe_rows(places, total), size, total)

    def state(self) -> dict[str, np.ndarray]:
        """Everything, for a checkpoint: whole weights and accumulator as of now, and the uses. No cache is in it."""
        self._write_back(np.flatnonzero(self._row != NOWHERE))
        return {**self._host, "uses": self._uses}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`, with an empty cache, on any mesh and with a cache of any size. Raises ValueError."""
        for name, whole in {**self._host, "uses": self._uses}.items():
            if name not in state or state[name].shape != whole.shape:
                there = state[name].shape if name in state else "not there"
                raise ValueError(f"{name} of the saved table is {there}, this table wants {whole.shape}")
            whole[...] = state[name]
        self._place[:], self._row[:] = NOWHERE, NOWHERE


def _padded(values: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    missing = [(0, size - len(values)), *[(0, 0)] * (values.ndim - 1)]
    return np.pad(values, missing, constant_values=fill)


def _local(rows_M: jax.Array, rows: int) -> jax.Array:
    """Rows on this device, `rows` for those on others."""
    local = rows_M - jax.lax.axis_index(OWNERS) * rows
    return jnp.where((local >= 0) & (local < rows), local, rows)


@partial(jax.jit, static_argnums=0)
def _load(spec: P, array: jax.Array, rows_M: jax.Array) -> jax.Array:
    """Rows of an array on the devices: zeros from those that have not got one, added up."""

    def body(array: jax.Array, rows_M: jax.Array) -> jax.Array:
        mine = array.at[_local(rows_M, array.shape[0])].get(mode="fill", fill_value=0)
        return jax.lax.psum(mine, OWNERS)

    out = P(None, *spec[1:])
    return jax.shard_map(body, in_specs=(spec, P()), out_specs=out, check_vma=False)(array, rows_M)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _store(spec: P, array: jax.Array, rows_M: jax.Array, values_M: jax.Array) -> jax.Array:
    """The array with these rows in it."""

    def body(array: jax.Array, rows_M: jax.Array, values_M: jax.Array) -> jax.Array:
        return array.at[_local(rows_M, array.shape[0])].set(values_M, mode="drop")

    values = P(None, *spec[1:])
    values_M = jax.reshard(values_M, values)
    return jax.shard_map(body, in_specs=(spec, P(), values), out_specs=spec, check_vma=False)(array, rows_M, values_M)
