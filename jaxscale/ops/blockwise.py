"""Attention of one block of queries over one block of keys at a time: what the ring and the gather form are made of.

A softmax over blocks that come one after the other keeps, for each query, the largest score so far and the sum of the
exponentials relative to it, in float32 (Milakov and Gimelshein 2018; Rabe and Staats 2021). Backward, each block's
weights are computed again from the log-sum-exp of the whole row (Dao et al. 2022, "FlashAttention", section 3.1).
Read next: `ring_attention.py`.

Shapes: B rows, G key/value heads, R query heads of each, S queries, T keys, K head dim. All of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.ops import attention_xla
from jaxscale.ops.attention_xla import segment_mask

LOWEST = float(jnp.finfo(jnp.float32).min)


class Queries(NamedTuple):
    """A block of queries and where its positions lie in the row."""

    q_BGRSK: Array
    position_S: Array
    ids_BS: Array | None


class Keys(NamedTuple):
    """A block of keys and values and where its positions lie in the row."""

    k_BGTK: Array
    v_BGTK: Array
    position_T: Array
    ids_BT: Array | None


class Running(NamedTuple):
    """The softmax of each query over the blocks so far, float32."""

    out_BGRSK: Array
    """Sum of the values by weights relative to `top`."""
    top_BGRS: Array
    """Largest score."""
    sum_BGRS: Array
    """Sum of the weights."""


class Finished(NamedTuple):
    """What the backward pass knows of a block of queries: float32, but for the gradient of the output."""

    gradient_BGRSK: Array
    delta_BGRS: Array
    """Product of the output with its gradient: what the softmax takes off every weight's gradient."""
    lse_BGRS: Array
    """Log of the sum of the exponentials of all scores."""


@dataclass(frozen=True)
class Scores:
    """How scores are made: window and soft-cap as of `attention.attention`, 0 = none."""

    window: int
    softcap: float

    def mask(self, queries: Queries, keys: Keys) -> Array:
        """Bool (B or 1, S, T)."""
        mask = attention_xla.position_mask(queries.position_S, keys.position_T, self.window)
        if queries.ids_BS is not None and keys.ids_BT is not None:
            mask = mask & segment_mask(queries.ids_BS, keys.ids_BT)
        return mask

    def of(self, queries: Queries, keys: Keys) -> Array:
        """Float32 (B, G, R, S, T), before the mask."""
        scale = queries.q_BGRSK.shape[-1] ** -0.5
        scores = jnp.einsum("BGRSK,BGTK->BGRST", queries.q_BGRSK, keys.k_BGTK, preferred_element_type=jnp.float32)
        return self.softcap * jnp.tanh(scores * (scale / self.softcap)) if self.softcap else scores * scale


def nothing_yet(q_BGRSK: Array) -> Running:
    """The softmax over no block."""
    shape = q_BGRSK.shape
    zeros = jnp.zeros(shape, jnp.float32)
    return Running(zeros, jnp.full(shape[:-1], LOWEST, jnp.float32), jnp.zeros(shape[:-1], jnp.float32))


def add_block(scores: Scores, running: Running, queries: Queries, keys: Keys) -> Running:
    """Goes on over one more block. Queries that the mask leaves nothing of it stay as they are."""

    def part(running: Running, queries: Queries) -> Running:
        mask = scores.mask(queries, keys)[:, None, None]
        found = scores.of(queries, keys)
        top = jnp.maximum(running.top_BGRS, jnp.where(mask, found, LOWEST).max(-1))
        weights = jnp.where(mask, jnp.exp(found - top[..., None]), 0)
        kept = jnp.exp(running.top_BGRS - top)
        values = jnp.einsum(
            "BGRST,BGTK->BGRSK", weights.astype(keys.v_BGTK.dtype), keys.v_BGTK, preferred_element_type=jnp.float32
        )
        out = running.out_BGRSK * kept[..., None] + values
        return Running(out, top, running.sum_BGRS * kept + weights.sum(-1))

    return _by_queries(lambda none, *given: (none, part(*given)), keys, (), running, queries)[1]


def finish(running: Running) -> tuple[Array, Array]:
    """(output (B, G, R, S, K), log-sum-exp (B, G, R, S)), float32. Every query has seen itself by now."""
    return running.out_BGRSK / running.sum_BGRS[..., None], running.top_BGRS + jnp.log(running.sum_BGRS)


def gradients(scores: Scores, finished: Finished, queries: Queries, keys: Keys) -> tuple[Array, tuple[Array, Array]]:
    """What a block adds to the gradients of its queries, and of its keys and values. Float32."""

    def part(sums: tuple[Array, Array], finished: Finished, queries: Queries) -> tuple[tuple[Array, Array], Array]:
        q, k, v = queries.q_BGRSK, keys.k_BGTK, keys.v_BGTK
        found = scores.of(queries, keys)
        mask = scores.mask(queries, keys)[:, None, None]
        weights = jnp.where(mask, jnp.exp(found - finished.lse_BGRS[..., None]), 0)
        of_out = finished.gradient_BGRSK
        of_weights = jnp.einsum("BGRSK,BGTK->BGRST", of_out, v, preferred_element_type=jnp.float32)
        of_scores = weights * (of_weights - finished.delta_BGRS[..., None]) * q.shape[-1] ** -0.5
        if scores.softcap:
            of_scores *= 1 - (found / scores.softcap) ** 2
        narrow = of_scores.astype(k.dtype)
        of_q = jnp.einsum("BGRST,BGTK->BGRSK", narrow, k, preferred_element_type=jnp.float32)
        of_k = jnp.einsum("BGRST,BGRSK->BGTK", narrow, q, preferred_element_type=jnp.float32)
        of_v = jnp.einsum("BGRST,BGRSK->BGTK", weights.astype(v.dtype), of_out, preferred_element_type=jnp.float32)
        return (sums[0] + of_k, sums[1] + of_v), of_q

    none = jnp.zeros(keys.k_BGTK.shape, jnp.float32)
    of_keys, of_q = _by_queries(part, keys, (none, none), finished, queries)
    return of_q, of_keys


def _by_queries[Sums, Given: tuple, Result](
    part: Callable[[Sums, Given, Queries], tuple[Sums, Result]], keys: Keys, sums: Sums, given: Given, queries: Queries
) -> tuple[Sums, Result]:
    """Walks a block's queries in parts, so that their float32 scores stay within `attention_xla.SCORE_BYTES`."""
    B, G, R, S, _ = queries.q_BGRSK.shape
    most = max(1, attention_xla.SCORE_BYTES // (4 * B * G * R * keys.k_BGTK.shape[2]))
    count = next(n for n in range(1, S + 1) if S % n == 0 and S // n <= most)
    if count == 1:
        return part(sums, given, queries)

    def cut(x: Array, dim: int) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:dim], count, S // count, *x.shape[dim + 1 :]), dim, 0)

    ids = None if queries.ids_BS is None else cut(queries.ids_BS, 1)
    parts = Queries(cut(queries.q_BGRSK, 3), cut(queries.position_S, 0), ids)
    sums, results = jax.lax.scan(
        lambda sums, x: part(sums, *x), sums, (jax.tree.map(lambda x: cut(x, 3), given), parts)
    )
    return sums, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], S, *x.shape[5:]), results)
