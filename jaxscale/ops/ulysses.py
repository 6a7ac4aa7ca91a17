"""Ulysses: devices of `context` exchange parts of the sequence for heads, attend to whole rows, and exchange back.

Between the two exchanges each device has whole rows of H / C heads, so any kernel computes them (Jacobs et al. 2023,
"DeepSpeed Ulysses"). Where there are fewer key heads than devices, each is copied to all devices whose queries read it.
Read next: `ring_attention.py`, for more devices than heads.

Shapes: B rows, S positions, H query heads, G key/value heads, K head dim, C devices of the axis.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.parallel import context
from jaxscale.parallel.context import AXIS

Local = Callable[[Array, Array, Array, Array | None], Array]
"""Attention of one device's whole rows and heads."""


def ulysses_attention(
    local: Local, q_BSHK: Array, k_BSGK: Array, v_BSGK: Array, ids_BS: Array | None, *, check_vma: bool
) -> Array:
    """Attention of rows in their own order, computed by `local`.

    q, k, v: P(rows, "context", heads, None); ids_BS: int32 P(rows, None), whole rows on every device. Returns
    (B, S, H, K), sharded as q. C divides H of a device, and divides G or is a multiple of it (`context.choose`).
    """
    spec = jax.typeof(q_BSHK).sharding.spec

    def body(q_BSHK: Array, k_BSGK: Array, v_BSGK: Array, ids_BS: Array | None) -> Array:
        copies = context.head_copies(k_BSGK.shape[2], jax.lax.axis_size(AXIS))
        if copies > 1:
            k_BSGK, v_BSGK = (jnp.repeat(x, copies, axis=2) for x in (k_BSGK, v_BSGK))
        q, k, v = (jax.lax.all_to_all(x, AXIS, 2, 1, tiled=True) for x in (q_BSHK, k_BSGK, v_BSGK))
        return jax.lax.all_to_all(local(q, k, v, ids_BS), AXIS, 1, 2, tiled=True)

    return jax.shard_map(
        body,
        in_specs=(spec, spec, spec, None if ids_BS is None else P(spec[0], None)),
        out_specs=spec,
        axis_names=axes.automatic(),
        check_vma=check_vma,
    )(q_BSHK, k_BSGK, v_BSGK, ids_BS)
