"""Rows of a table in parts on several devices: ids to their owners, vectors back, in as many rounds as it takes.

A device sends each owner at most `capacity` distinct ids a round, so buffers are small where ids spread over the owners
and nothing is dropped where they do not: then there are more rounds. All devices agree on the border of a round for
each owner, the first row that somebody has no room for; so a row is in the same round on all devices, and an owner
has its whole gradient at once. Inside a fully manual `jax.shard_map`. Read next: `table.py`.

Legend: L distinct ids of a device, N owners, C capacity, R rows on a device, D columns on a device.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxscale import axes
from jaxscale.optim.sparse import SparseRule, update_rows

OWNERS = axes.BATCH_AXES
"""Mesh axes over which rows are split: those of the batch, so that each device asks for the ids of its own examples."""


def capacity(ids: int, owners: int, factor: float) -> int:
    """Ids that a device may send to each owner in a round: `factor` times an even share; 0 = all of them, one round."""
    return min(ids, max(1, -(-int(ids * factor) // owners))) if factor else ids


def send(x: jax.Array) -> jax.Array:
    """(N, ...) with a part for each owner -> (N, ...) with a part from each device."""
    return jax.lax.all_to_all(x, OWNERS, 0, 0, tiled=True)


def in_rounds[Carry](
    distinct_L: jax.Array, rows: int, capacity: int, body: Callable[[Carry, jax.Array, jax.Array], Carry], carry: Carry
) -> tuple[Carry, jax.Array]:
    """Folds `body(carry, place, local)` over the rounds. Also returns how many there were, int32.

    distinct_L: sorted and distinct; owner n has rows n R to (n + 1) R - 1, greater ids are none. place (N, C): where
    the ids of the round stand in `distinct_L`, L = nothing there; local (N, C): the rows of the owner, R = none.
    """
    count, owners = distinct_L.shape[0], jax.lax.axis_size(OWNERS)
    last_row = (jnp.arange(owners, dtype=jnp.int32) + 1) * rows
    ends = jnp.searchsorted(distinct_L, last_row).astype(jnp.int32)
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])

    def one(carry: Carry, at: jax.Array, stop: jax.Array) -> Carry:
        place = at[:, None] + jnp.arange(capacity, dtype=jnp.int32)
        place = jnp.where(place < stop[:, None], place, count)
        first_row = (last_row - rows)[:, None]
        local = distinct_L.at[place].get(mode="fill", fill_value=0) - first_row
        return body(carry, place, jnp.where(place < count, local, rows))

    if capacity >= count:
        return one(carry, begins, ends), jnp.int32(1)

    def more(loop: tuple[Carry, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return loop[2]

    def next_round(
        loop: tuple[Carry, jax.Array, jax.Array, jax.Array],
    ) -> tuple[Carry, jax.Array, jax.Array, jax.Array]:
        carry, at, _, rounds = loop
        full = jnp.minimum(at + capacity, ends)
        left_over = distinct_L[jnp.minimum(full, count - 1)]
        border = jax.lax.pmin(jnp.where(full < ends, left_over, last_row), OWNERS)
        stop = jnp.searchsorted(distinct_L, border).astype(jnp.int32)
        return one(carry, at, stop), stop, jnp.any(border < last_row), rounds + 1

    carry, _, _, rounds = jax.lax.while_loop(more, next_round, (carry, begins, jnp.bool_(True), jnp.int32(0)))
    return carry, rounds


def fetch(table_RD: jax.Array, distinct_L: jax.Array, capacity: int, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The vectors of distinct global rows, (L, D) in `dtype`, zeros for what is no row; and the rounds it took."""

    def body(found_LD: jax.Array, place: jax.Array, local: jax.Array) -> jax.Array:
        vectors = table_RD.at[send(local)].get(mode="fill", fill_value=0).astype(dtype)
        return found_LD.at[place].set(send(vectors), mode="drop")

    zeros = jnp.zeros((distinct_L.shape[0], table_RD.shape[1]), dtype)
    return in_rounds(distinct_L, table_RD.shape[0], capacity, body, zeros)


def give_back(
    rule: SparseRule,
    table_RD: jax.Array,
    accumulator: jax.Array | None,
    distinct_L: jax.Array,
    gradient_LD: jax.Array,
    capacity: int,
    rate: jax.Array,
    row_mean: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """The owners' rows after one update: gradients of distinct rows go to the owners, who add them up."""
    width = table_RD.shape[1]

    def body(
        tables: tuple[jax.Array, jax.Array | None], place: jax.Array, local: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        gradient = gradient_LD.at[place].get(mode="fill", fill_value=0)
        rows_M, gradient_MD = send(local).reshape(-1), send(gradient).reshape(-1, width)
        return update_rows(rule, *tables, rows_M, gradient_MD, rate, row_mean)

    tables, _ = in_rounds(distinct_L, table_RD.shape[0], capacity, body, (table_RD, accumulator))
    return tables
