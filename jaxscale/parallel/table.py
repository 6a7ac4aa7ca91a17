"""Lookup in huge embedding tables that are split over the devices of the batch, and the update of the rows looked up.

Ids travel to the devices that have their rows, vectors travel back, both by all-to-all; nobody gathers a table, and a
gradient is never more than the vectors of the batch. `table_layout.py` says where rows lie; docs/recommendation.md when
to use which placement. Read next: `exchange.py`, then `train/tables.py`, which calls this in a step.

Legend: B examples (of the batch outside, of a device inside `shard_map`), H ids an example, F features, D columns, N
devices that split the batch, L = B H ids of a device, V bins, h ids and f features of a bin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxscale import axes
from jaxscale.optim.sparse import SparseRule, add_up, merge, update_rows
from jaxscale.parallel import exchange
from jaxscale.parallel.exchange import OWNERS, send
from jaxscale.parallel.table_layout import Bags, Bins, Placement, padded_rows, stripe_order
from jaxscale.task import Parameter

Counts = dict[str, jax.Array]
"""`table_ids`: ids looked up; `table_unique`: of them, those that crossed the network (distinct on their device);
`table_rounds`: of the exchange. float32 scalars over all devices."""

AXES: dict[Placement, tuple[str | None, ...]] = {
    "row": ("table_rows", "table_width"),
    "column": (None, "table_columns"),
    "table": ("table_bins", None, "table_width"),
}
"""Logical axes of the array of each placement."""

MOST = 2**31
"""Rows of an array and ids of a device are counted in int32."""


@dataclass(frozen=True)
class TableGroup:
    """Tables of one placement in one array. Features outside have all ids of the model; `columns` are the group's.

    `bins`: of placement `table`; `factor`: `exchange.capacity` of placement `row`; `compute`: dtype of the vectors that
    are looked up and sent.
    """

    placement: Placement
    bags: Bags
    columns: tuple[int, ...]
    width: int
    pooling: Literal["sum", "mean"]
    bins: int
    factor: float
    compute: str

    @property
    def parameter(self) -> Parameter:
        """The array of all tables of the group."""
        shapes: dict[Placement, tuple[int, ...]] = {
            "row": (padded_rows(self.bags.rows), self.width),
            "column": (self.bags.rows, self.width),
            "table": (self.bins, Bins(self.bags, self.bins).rows, self.width),
        }
        return Parameter(shapes[self.placement], AXES[self.placement], scale=self.width**-0.5, sparse=True)

    def slot_axes(self, dims: int) -> tuple[str | None, ...]:
        """Logical axes of an accumulator: of the rows alone (1), or of rows and columns (2)."""
        return AXES[self.placement] if dims == 2 else AXES[self.placement][:-1]

    def look_up(self, table: jax.Array, ids_BH: jax.Array) -> tuple[jax.Array, Counts]:
        """The pooled bags (B, F, D) in `compute`, sharded P(batch, None, tensor), and what the exchange counted.

        ids_BH: (B, H) int32 of the whole model, P(batch); negative ids are padding. An empty bag is zeros. Ids must be
        below the rows of their table: nothing looks here, the loader does.
        """
        body = partial(_LOOK_UP[self.placement], self)
        found: tuple[jax.Array, Counts] = jax.shard_map(
            body,
            in_specs=(self._spec, P(OWNERS, None)),
            out_specs=(P(OWNERS, None, "tensor"), P()),
            axis_names=axes.automatic(),
            check_vma=False,  # nothing is differentiated through it
        )(table, ids_BH)
        return found

    def update(
        self,
        rule: SparseRule,
        table: jax.Array,
        accumulator: jax.Array | None,
        ids_BH: jax.Array,
        gradient_BFD: jax.Array,
        rate: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Table and accumulator after one update of the rows that the batch has; every other row keeps its bits.

        gradient_BFD: of the bags as `look_up` returned them; rate: float32 scalar.
        """
        dims = rule.slot_dims()
        slot = None if dims is None else axes.spec(*self.slot_axes(dims))
        gradient_BFD = jax.reshard(gradient_BFD, P(OWNERS, None, "tensor"))

        def body(table: Any, accumulator: Any, ids_BH: Any, gradient_BFD: Any, rate: Any) -> Any:
            return _UPDATE[self.placement](self, rule, table, accumulator, ids_BH, gradient_BFD, rate)

        updated: tuple[jax.Array, jax.Array | None] = jax.shard_map(
            body,
            in_specs=(self._spec, slot, P(OWNERS, None), P(OWNERS, None, "tensor"), P()),
            out_specs=(self._spec, slot),
            axis_names=axes.automatic(),
            check_vma=False,
        )(table, accumulator, ids_BH, gradient_BFD, rate)
        return updated

    @property
    def _spec(self) -> P:
        return axes.spec(*AXES[self.placement])

    # Bags of a device

    def _mine(self, ids_BH: jax.Array) -> jax.Array:
        """The ids of the group's features, (B, H) with the group's own H."""
        return ids_BH if len(self.columns) == ids_BH.shape[1] else ids_BH[:, jnp.array(self.columns)]

    def _weight(self, ids_BH: jax.Array) -> jax.Array:
        """(B, H) what each id counts in its bag: 0 for padding, else 1, or 1 / the bag's ids for means."""
        real_BH = (ids_BH >= 0).astype(jnp.float32)
        if self.pooling == "sum":
            return real_BH
        return real_BH / jnp.maximum(self._pool(real_BH), 1)[:, self.bags.feature_of]

    def _pool(self, x: jax.Array) -> jax.Array:
        """Sums over the ids of each bag: (B, H, ...) -> (B, F, ...)."""
        if self.bags.hots == len(self.bags.features):
            return x
        return jnp.stack([x[:, a:b].sum(axis=1) for a, b in self.bags.spans], axis=1)

    def _pooled(self, vectors_BHD: jax.Array, ids_BH: jax.Array) -> jax.Array:
        weighted = vectors_BHD.astype(jnp.float32) * self._weight(ids_BH)[..., None]
        return self._pool(weighted).astype(self.compute)

    def _spread(self, gradient_BFD: jax.Array, ids_BH: jax.Array) -> jax.Array:
        """Gradient of each id's vector from that of its bag, float32: (B, H, D)."""
        each = gradient_BFD.astype(jnp.float32)[:, self.bags.feature_of]
        return each * self._weight(ids_BH)[..., None]

    def _stacked(self, ids_BH: jax.Array, none: int) -> jax.Array:
        """(L,) rows in the array of all tables one after the other; `none` for padding."""
        offsets = jnp.asarray(self.bags.offsets[self.bags.feature_of], jnp.int32)
        return jnp.where(ids_BH >= 0, ids_BH + offsets, none).reshape(-1)

    def _striped(self, ids_BH: jax.Array) -> jax.Array:
        """(L,) rows in a row-wise array, its number of rows for padding."""
        order = jnp.asarray(stripe_order())
        stripes, total = order.shape[0], self.parameter.shape[0]
        stacked = self._stacked(ids_BH, total)
        row = order[stacked % stripes] * (total // stripes) + stacked // stripes
        return jnp.where(stacked < total, row, total)

    def _row_mean(self, over: tuple[str, ...]) -> Callable[[jax.Array], jax.Array]:
        """Means over all columns of the tables, of which devices along `over` have parts."""
        return lambda x_MD: jax.lax.psum(jnp.sum(x_MD, axis=-1), over) / self.width


def _counts(ids_BH: jax.Array, unique: jax.Array, rounds: jax.Array) -> Counts:
    totals = jnp.stack([jnp.sum(ids_BH >= 0, dtype=jnp.float32), unique.astype(jnp.float32)])
    ids, distinct = jax.lax.psum(totals, OWNERS)
    return {"table_ids": ids, "table_unique": distinct, "table_rounds": rounds.astype(jnp.float32)}


# Row-wise: distinct ids to the owners of their rows, vectors back, bags pooled where they are wanted.


def _look_up_rows(group: TableGroup, table_RD: jax.Array, ids_BH: jax.Array) -> tuple[jax.Array, Counts]:
    ids_BH = group._mine(ids_BH)
    distinct_L, place_L, unique = merge(group._striped(ids_BH), group.parameter.shape[0])
    room = exchange.capacity(distinct_L.shape[0], jax.lax.axis_size(OWNERS), group.factor)
    found_LD, rounds = exchange.fetch(table_RD, distinct_L, room, group.compute)
    vectors_BHD = found_LD[place_L].reshape(*ids_BH.shape, -1)
    return group._pooled(vectors_BHD, ids_BH), _counts(ids_BH, unique, rounds)


def _update_rows(
    group: TableGroup, rule: SparseRule, table: Any, accumulator: Any, ids_BH: Any, gradient_BFD: Any, rate: Any
) -> tuple[jax.Array, jax.Array | None]:
    ids_BH = group._mine(ids_BH)
    distinct_L, place_L, _ = merge(group._striped(ids_BH), group.parameter.shape[0])
    each_LD = group._spread(gradient_BFD, ids_BH).reshape(place_L.shape[0], -1)
    room = exchange.capacity(distinct_L.shape[0], jax.lax.axis_size(OWNERS), group.factor)
    mean = group._row_mean(("tensor",))
    return exchange.give_back(rule, table, accumulator, distinct_L, add_up(each_LD, place_L), room, rate, mean)


# Column-wise: distinct ids to everybody, who answers with a part of each vector.


def _to_everybody(group: TableGroup, ids_BH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rows (N, L) that each device asks for, place of each id among its own device's, how many are distinct)."""
    distinct_L, place_L, unique = merge(group._stacked(ids_BH, group.bags.rows), group.bags.rows)
    rows_L = jnp.minimum(distinct_L, group.bags.rows)
    return send(jnp.broadcast_to(rows_L, (jax.lax.axis_size(OWNERS), *rows_L.shape))), place_L, unique


def _look_up_columns(group: TableGroup, table_RD: jax.Array, ids_BH: jax.Array) -> tuple[jax.Array, Counts]:
    ids_BH = group._mine(ids_BH)
    rows_NL, place_L, unique = _to_everybody(group, ids_BH)
    parts_NLD = send(table_RD.at[rows_NL].get(mode="fill", fill_value=0).astype(group.compute))
    found_LD = jnp.swapaxes(parts_NLD, 0, 1).reshape(place_L.shape[0], -1)
    vectors_BHD = found_LD[place_L].reshape(*ids_BH.shape, -1)
    return group._pooled(vectors_BHD, ids_BH), _counts(ids_BH, unique, jnp.int32(1))


def _update_columns(
    group: TableGroup, rule: SparseRule, table: Any, accumulator: Any, ids_BH: Any, gradient_BFD: Any, rate: Any
) -> tuple[jax.Array, jax.Array | None]:
    ids_BH = group._mine(ids_BH)
    rows_NL, place_L, _ = _to_everybody(group, ids_BH)
    each_LD = add_up(group._spread(gradient_BFD, ids_BH).reshape(place_L.shape[0], -1), place_L)
    parts_LND = each_LD.reshape(each_LD.shape[0], rows_NL.shape[0], -1)
    gradient_NLD = send(jnp.swapaxes(parts_LND, 0, 1))
    gradient_MD, mean = gradient_NLD.reshape(-1, gradient_NLD.shape[-1]), group._row_mean((*OWNERS, "tensor"))
    return update_rows(rule, table, accumulator, rows_NL.reshape(-1), gradient_MD, rate, mean)


# Table-wise: all ids of a table to the one device that has it, which pools; a vector for each bag comes back.


def _bin_rows(group: TableGroup, ids_BH: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """What this device's bins are asked for: ((N, V/N, B, h) rows in the flat local table, slot (V/N, h), no row)."""
    bins, owners = Bins(group.bags, group.bins), jax.lax.axis_size(OWNERS)
    mine = group.bins // owners
    none = mine * bins.rows
    columns = jnp.asarray(bins.columns)
    ids_BVh = ids_BH.at[:, columns].get(mode="fill", fill_value=-1)
    ids_VBh = jnp.where(ids_BVh >= 0, ids_BVh + jnp.asarray(bins.first_row), -1).swapaxes(0, 1)
    asked = send(ids_VBh.reshape(owners, mine, *ids_VBh.shape[1:]))
    in_bin = jnp.arange(mine, dtype=jnp.int32)[:, None, None] * bins.rows
    here = jax.lax.axis_index(OWNERS) * mine + jnp.arange(mine)
    return jnp.where(asked >= 0, asked + in_bin, none), jnp.asarray(bins.slot)[here], none


def _look_up_tables(group: TableGroup, table_VRD: jax.Array, ids_BH: jax.Array) -> tuple[jax.Array, Counts]:
    ids_BH = group._mine(ids_BH)
    bins, owners = Bins(group.bags, group.bins), jax.lax.axis_size(OWNERS)
    rows, slot_Vh, _ = _bin_rows(group, ids_BH)
    flat_RD = table_VRD.reshape(-1, table_VRD.shape[-1])
    vectors_NVBhD = flat_RD.at[rows].get(mode="fill", fill_value=0).astype(jnp.float32)
    if group.bags.hots == len(group.bags.features):
        pooled = vectors_NVBhD
    else:
        empty = jnp.zeros((*rows.shape[:3], bins.features, flat_RD.shape[-1]), jnp.float32)
        bin_of = jnp.arange(slot_Vh.shape[0])[:, None]
        # Advanced indices with a slice between them come first: (V/N, h, N, B, D).
        pooled = empty.at[:, bin_of, :, slot_Vh].add(vectors_NVBhD.transpose(1, 3, 0, 2, 4))
    back = send(pooled.astype(group.compute))
    bags_VBfD = back.reshape(owners * back.shape[1], *back.shape[2:])
    found_BFD = bags_VBfD[bins.place[:, 0], :, bins.place[:, 1]].swapaxes(0, 1)
    if group.pooling == "mean":
        real_BH = (ids_BH >= 0).astype(jnp.float32)
        found_BFD = (found_BFD / jnp.maximum(group._pool(real_BH), 1)[..., None]).astype(group.compute)
    return found_BFD, _counts(ids_BH, jnp.sum(ids_BH >= 0), jnp.int32(1))


def _update_tables(
    group: TableGroup, rule: SparseRule, table: Any, accumulator: Any, ids_BH: Any, gradient_BFD: Any, rate: Any
) -> tuple[jax.Array, jax.Array | None]:
    ids_BH = group._mine(ids_BH)
    bins, owners = Bins(group.bags, group.bins), jax.lax.axis_size(OWNERS)
    rows, slot_Vh, none = _bin_rows(group, ids_BH)
    gradient_BFD = gradient_BFD.astype(jnp.float32)
    if group.pooling == "mean":
        real_BH = (ids_BH >= 0).astype(jnp.float32)
        gradient_BFD = gradient_BFD / jnp.maximum(group._pool(real_BH), 1)[..., None]
    parts_BVfD = gradient_BFD.at[:, jnp.asarray(bins.feature)].get(mode="fill", fill_value=0)
    parts_VBfD = parts_BVfD.swapaxes(0, 1)
    come = send(parts_VBfD.reshape(owners, group.bins // owners, *parts_VBfD.shape[1:]))
    each = jnp.take_along_axis(come, slot_Vh[None, :, None, :, None], axis=3)
    width = table.shape[-1]
    flat_slot = None if accumulator is None else accumulator.reshape(none, *accumulator.shape[2:])
    mean = group._row_mean(("tensor",))
    updated, flat_slot = update_rows(
        rule, table.reshape(none, width), flat_slot, rows.reshape(-1), each.reshape(-1, width), rate, mean
    )
    return updated.reshape(table.shape), None if flat_slot is None else flat_slot.reshape(accumulator.shape)


_LOOK_UP: dict[Placement, Callable[..., tuple[jax.Array, Counts]]] = {
    "row": _look_up_rows,
    "column": _look_up_columns,
    "table": _look_up_tables,
}
_UPDATE: dict[Placement, Callable[..., tuple[jax.Array, jax.Array | None]]] = {
    "row": _update_rows,
    "column": _update_columns,
    "table": _update_tables,
}


def make_groups(
    placements: tuple[Placement, ...],
    bags: Bags,
    *,
    width: int,
    pooling: Literal["sum", "mean"],
    bins: int,
    factor: float,
    compute: DTypeLike,
) -> tuple[tuple[TableGroup, ...], tuple[int, ...]]:
    """The tables of a model by placement; and where each feature is when the groups' bags are joined in their order.

    placements: one of each feature. Raises ValueError for arrays of more rows than int32 counts.
    """
    groups, joined = [], []
    for placement in dict.fromkeys(placements):
        mine = [f for f, own in enumerate(placements) if own == placement]
        own_bags = Bags(tuple(bags.features[f] for f in mine))
        columns = tuple(column for f in mine for column in range(*bags.spans[f]))
        group = TableGroup(placement, own_bags, columns, width, pooling, bins, factor, jnp.dtype(compute).name)
        if padded_rows(own_bags.rows) >= MOST // 2:
            raise ValueError(f"{own_bags.rows:,} rows of placement {placement}: {MOST // 2:,} can be counted")
        groups.append(group)
        joined += mine
    return tuple(groups), tuple(joined.index(f) for f in range(len(placements)))
