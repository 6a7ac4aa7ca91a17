"""Attention of rows in the balanced order, forward and backward as programs of one device: the ring or the gather form.

The gradient rule is written out: a backward pass recomputes each block from the output and the log-sum-exp, so that
neither scores nor other devices' keys are kept. Read next: `ring_attention.py` and `gathered_attention.py`.

Shapes: B rows, S positions, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.ops.blockwise import Scores


class Walk(NamedTuple):
    """A form, as what one device does with its part of the arrays, inside a manual region."""

    forward: Callable[[Scores, Array, Array, Array, Array | None], tuple[Array, Array]]
    """(scores, q_BSHK, k_BSGK, v_BSGK, ids_BS) -> (out_BSHK, log-sum-exp float32 (B, S, H))"""
    backward: Callable[..., tuple[Array, Array, Array]]
    """(those, out_BSHK, lse_BSH, gradient of out_BSHK) -> gradients of q, k and v"""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def balanced_attention(
    walk: Walk, scores: Scores, q_BSHK: Array, k_BSGK: Array, v_BSGK: Array, ids_BS: Array | None
) -> Array:
    """Causal attention within segments; the same numbers as `attention.attention` of the rows in their own order.

    q, k, v: P(rows, "context", heads, None), positions in the order `context.order`; ids_BS: int32 P(rows, "context").
    Returns (B, S, H, K), sharded as q.
    """
    return _forward(walk, scores, q_BSHK, k_BSGK, v_BSGK, ids_BS)[0]


def _forward(
    walk: Walk, scores: Scores, q_BSHK: Array, k_BSGK: Array, v_BSGK: Array, ids_BS: Array | None
) -> tuple[Array, Any]:
    spec = jax.typeof(q_BSHK).sharding.spec
    out_BSHK, lse_BSH = jax.shard_map(
        partial(walk.forward, scores),
        in_specs=(spec, spec, spec, None if ids_BS is None else P(*spec[:2])),
        out_specs=(spec, P(*spec[:3])),
        axis_names=axes.automatic(),
        check_vma=False,  # a device's share of a sum is not said to vary until it is summed
    )(q_BSHK, k_BSGK, v_BSGK, ids_BS)
    # By this name a rematerialisation policy keeps both, and the backward pass repeats no attention.
    out_BSHK, lse_BSH = (checkpoint_name(x, "attention") for x in (out_BSHK, lse_BSH))
    return out_BSHK, (q_BSHK, k_BSGK, v_BSGK, ids_BS, out_BSHK, lse_BSH)


def _backward(walk: Walk, scores: Scores, residuals: Any, gradient_BSHK: Array) -> tuple[Array, Array, Array, None]:
    q_BSHK, _, _, ids_BS, _, _ = residuals
    spec = jax.typeof(q_BSHK).sharding.spec
    of_q, of_k, of_v = jax.shard_map(
        partial(walk.backward, scores),
        in_specs=(spec, spec, spec, None if ids_BS is None else P(*spec[:2]), spec, P(*spec[:3]), spec),
        out_specs=(spec, spec, spec),
        axis_names=axes.automatic(),
        check_vma=False,
    )(*residuals, jax.reshard(gradient_BSHK, spec))
    return of_q, of_k, of_v, None


balanced_attention.defvjp(_forward, _backward)
