"""Optimizers of embedding tables: only the rows that a batch touched are read and written, as a dense one would.

The gradient of a table is a list of (row, vector), in which a row may stand several times. Equal rows are added up,
then each touched row is updated once. Untouched rows have no gradient, and these rules leave such rows as they are
(there is no momentum and no decay), so the result is that of the dense update. Read next: `parallel/table.py`.

Legend: R rows on a device, D columns on a device, M entries of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

Name = Literal["rowwise-adagrad", "adagrad", "sgd"]


@dataclass(frozen=True)
class SparseRule:
    """`rowwise-adagrad`: one accumulator for a row, the sum of its mean squared gradients (Mudigere et al. 2022,
    section 4.1.4, "Software-hardware co-design for training deep learning recommendation models"); `adagrad`: one for
    each number (Duchi et al. 2011); `sgd`: none. new = old - rate * gradient / (sqrt(accumulator) + epsilon).
    """

    name: Name
    epsilon: float

    def slot_dims(self) -> int | None:
        """Dims of the accumulator: 1 = the rows, 2 = rows and columns, None = there is none."""
        return {"rowwise-adagrad": 1, "adagrad": 2, "sgd": None}[self.name]

    def step(
        self, gradient_MD: jax.Array, accumulator: jax.Array | None, row_mean: Callable[[jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Direction (M, D) to subtract, and what to add to the accumulator of these rows: (M,), (M, D) or None.

        row_mean: (M, D) -> (M,), over all columns of the table, also those on other devices.
        """
        if self.name == "sgd":
            return gradient_MD, None
        assert accumulator is not None
        square = jnp.square(gradient_MD)
        more = row_mean(square) if self.name == "rowwise-adagrad" else square
        root = jnp.sqrt(accumulator + more) + self.epsilon
        return gradient_MD / (root[:, None] if root.ndim == 1 else root), more


def merge(rows_M: jax.Array, end: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distinct rows: (sorted distinct rows (M,), place of each entry among them (M,), how many are below `end`).

    Entries of `end` or more stand for no row. What the distinct rows leave free is filled with numbers above `end`, all
    different, so that the whole stays sorted and distinct.
    """
    count = rows_M.shape[0]
    order = jnp.argsort(rows_M)
    ordered = rows_M[order]
    is_first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    place = jnp.cumsum(is_first, dtype=jnp.int32) - 1
    filler = end + jnp.arange(count, dtype=jnp.int32)
    distinct = filler.at[place].set(jnp.where(ordered < end, ordered, end + place))
    found = jnp.sum(is_first & (ordered < end), dtype=jnp.int32)
    return distinct, jnp.zeros(count, jnp.int32).at[order].set(place), found


def add_up(vectors_MD: jax.Array, place_M: jax.Array) -> jax.Array:
    """The sum of the vectors of each distinct row, in float32: (M, D), zeros where there are fewer rows."""
    zeros = jnp.zeros(vectors_MD.shape, jnp.float32)
    return zeros.at[place_M].add(vectors_MD.astype(jnp.float32))


def update_rows(
    rule: SparseRule,
    table_RD: jax.Array,
    accumulator: jax.Array | None,
    rows_M: jax.Array,
    gradient_MD: jax.Array,
    rate: jax.Array,
    row_mean: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array | None]:
    """The table and its accumulator, (R,) or (R, D), after one update of the rows that `rows_M` names (R = none).

    Work and memory are those of M rows. Equal rows are added up before the rule sees them.
    """
    distinct_M, place_M, _ = merge(rows_M, table_RD.shape[0])
    total_MD = add_up(gradient_MD, place_M)
    mine = None if accumulator is None else accumulator.at[distinct_M].get(mode="fill", fill_value=0)
    direction_MD, more = rule.step(total_MD, mine, row_mean)
    change_MD = (-rate * direction_MD).astype(table_RD.dtype)
    if accumulator is not None and more is not None:
        # The accumulator is read before it is written: told so, the compiler need not copy it.
        accumulator, change_MD = jax.lax.optimization_barrier((accumulator, change_MD))
        accumulator = _add(accumulator, distinct_M, more)
    return _add(table_RD, distinct_M, change_MD), accumulator


def _add(table: jax.Array, rows_M: jax.Array, change: jax.Array) -> jax.Array:
    return table.at[rows_M].add(change, mode="drop", indices_are_sorted=True, unique_indices=True)
