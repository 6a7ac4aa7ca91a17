"""A device's early and late chunk of a row as stacked halves, and the work on one pair of chunks.

The ring and the gather form differ in where keys come from; what a device does with a pair is here.
Read next: `blockwise.py`, which computes a block.

Shapes: B rows, S positions of a device, c = S / 2 of a chunk, H query heads, G key/value heads, R = H / G, K head dim;
a leading 2 is the half: EARLY, LATE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.ops import blockwise
from jaxscale.ops.blockwise import Finished, Keys, Queries, Running, Scores
from jaxscale.parallel import context
from jaxscale.parallel.context import AXIS

Of = tuple[Array, tuple[Array, Array]]
"""Gradients, float32: of all queries of the device (2, B, G, R, c, K), of a block's keys and values."""


def of_queries(x_BSHK: Array, groups: int) -> Array:
    """(2, B, G, R, c, K). Heads before positions, as the products want them."""
    B, S, H, K = x_BSHK.shape
    return x_BSHK.reshape(B, 2, S // 2, groups, H // groups, K).transpose(1, 0, 3, 4, 2, 5)


def of_keys(x_BSGK: Array) -> Array:
    """(2, B, G, c, K)."""
    B, S, G, K = x_BSGK.shape
    return x_BSGK.reshape(B, 2, S // 2, G, K).transpose(1, 0, 3, 2, 4)


def of_ids(ids_BS: Array | None) -> Array | None:
    """(2, B, c)."""
    return None if ids_BS is None else ids_BS.reshape(ids_BS.shape[0], 2, -1).swapaxes(0, 1)


def united_queries(x_2BGRcK: Array) -> Array:
    """(B, S, H, K)."""
    _, B, G, R, c, K = x_2BGRcK.shape
    return x_2BGRcK.transpose(1, 0, 4, 2, 3, 5).reshape(B, 2 * c, G * R, K)


def united_keys(x_2BGcK: Array) -> Array:
    """(B, S, G, K)."""
    _, B, G, c, K = x_2BGcK.shape
    return x_2BGcK.transpose(1, 0, 3, 2, 4).reshape(B, 2 * c, G, K)


def finished(out_BSHK: Array, lse_BSH: Array, gradient_BSHK: Array, groups: int) -> Finished:
    """What the backward pass knows of all queries, its arrays with a leading 2."""
    delta_BSH = jnp.sum(out_BSHK.astype(jnp.float32) * gradient_BSHK.astype(jnp.float32), axis=-1)
    return Finished(
        of_queries(gradient_BSHK, groups),
        of_queries(delta_BSH[..., None], groups)[..., 0],
        of_queries(lse_BSH[..., None], groups)[..., 0],
    )


@dataclass(frozen=True)
class Device:
    """The queries of this device, while a program for all devices is traced."""

    scores: Scores
    queries_2: Queries
    """Arrays with a leading 2, positions too."""

    @property
    def context(self) -> int:
        return jax.lax.axis_size(AXIS)

    @property
    def index(self) -> Array:
        return jax.lax.axis_index(AXIS)

    @property
    def chunk(self) -> int:
        return self.queries_2.q_BGRSK.shape[4]

    @property
    def reach(self) -> int:
        return context.reach(self.scores.window, self.chunk, self.context)

    def no_softmax(self) -> Running:
        """Of no keys yet."""
        return jax.vmap(blockwise.nothing_yet)(self.queries_2.q_BGRSK)

    def result(self, running_2: Running, like_BSHK: Array) -> tuple[Array, Array]:
        """(output (B, S, H, K), log-sum-exp (B, S, H)) when all keys were met."""
        out_2, lse_2 = blockwise.finish(running_2)
        return united_queries(out_2).astype(like_BSHK.dtype), united_queries(lse_2[..., None])[..., 0]

    def attend(self, running_2: Running, half: Any, keys: Keys, key_chunk: Any) -> Running:
        """One half of the queries meets a block of keys."""

        def work() -> Running:
            added = blockwise.add_block(self.scores, _take(running_2, half), _take(self.queries_2, half), keys)
            return _put(running_2, half, added)

        return self._if_needed(half, key_chunk, work, lambda: running_2)

    def pull(self, of_q_2: Array, finished_2: Finished, half: Any, keys: Keys, key_chunk: Any) -> Of:
        """The same backward: gradients of the queries go on, those of the block are this pair's share."""

        def work() -> Of:
            queries = _take(self.queries_2, half)
            of_q, of_keys = blockwise.gradients(self.scores, _take(finished_2, half), queries, keys)
            return _put(of_q_2, half, _take(of_q_2, half) + of_q), of_keys

        none = jnp.zeros(keys.k_BGTK.shape, jnp.float32)
        return self._if_needed(half, key_chunk, work, lambda: (of_q_2, (none, none)))

    def _if_needed[Result](
        self, half: Any, key_chunk: Any, work: Callable[[], Result], otherwise: Callable[[], Result]
    ) -> Result:
        """Without a window, every pair that a schedule names is needed."""
        if self.reach == 2 * self.context - 1:
            return work()
        early, late = context.chunks_of(self.index, self.context)
        query_chunk = jnp.where(half == context.EARLY, early, late)
        needed = (key_chunk >= 0) & context.is_needed(query_chunk, key_chunk, self.reach)
        return jax.lax.cond(needed, work, otherwise)


def this_device(scores: Scores, q_BSHK: Array, groups: int, ids_BS: Array | None) -> Device:
    """Of what a device holds of the queries, inside a manual region."""
    q_2 = of_queries(q_BSHK, groups)
    c, size = q_2.shape[4], jax.lax.axis_size(AXIS)
    chunks = jnp.stack(context.chunks_of(jax.lax.axis_index(AXIS), size))
    return Device(scores, Queries(q_2, positions(chunks, c), of_ids(ids_BS)))


def positions(chunk: Array, length: int) -> Array:
    """(..., length): positions in the row of chunks with these numbers."""
    return jnp.asarray(chunk)[..., None] * length + jnp.arange(length)


def _take[Tree](tree: Tree, half: Any) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, half, 0, keepdims=False), tree)


def _put[Tree](tree: Tree, half: Any, values: Tree) -> Tree:
    return jax.tree.map(lambda x, value: jax.lax.dynamic_update_index_in_dim(x, value, half, 0), tree, values)
