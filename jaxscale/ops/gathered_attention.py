"""Context parallelism by gathering: each device keeps its queries and gathers the keys and values of the whole row.

Rows lie in the balanced order of `parallel/context.py`: every device walks the same number of pairs of chunks. Keys are
gathered again for the backward pass rather than kept, and their gradients are summed and scattered in float32.
Read next: `halves.py`, the work on one pair.

Shapes: B rows, S positions of a device, c = S / 2 of a chunk, H query heads, G key/value heads, K head dim; C devices
of the axis, N = 2 C chunks of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.ops import halves
from jaxscale.ops.balanced_attention import Walk
from jaxscale.ops.blockwise import Keys, Running, Scores
from jaxscale.ops.halves import Device
from jaxscale.parallel import context
from jaxscale.parallel.context import AXIS


def _walk(scores: Scores, q_BSHK: Array, k_BSGK: Array, v_BSGK: Array, ids_BS: Array | None) -> tuple[Array, Array]:
    device = halves.this_device(scores, q_BSHK, k_BSGK.shape[2], ids_BS)
    chunks = _gathered(k_BSGK, v_BSGK, ids_BS)

    def meet(running_2: Running, slot: Array) -> tuple[Running, None]:
        half, keys, chunk = _pair(device, slot, chunks)
        return device.attend(running_2, half, keys, chunk), None

    slots = jnp.arange(context.gather_slots(device.context, device.reach))
    return device.result(jax.lax.scan(meet, device.no_softmax(), slots)[0], q_BSHK)


def _walk_back(
    scores: Scores,
    q_BSHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    ids_BS: Array | None,
    out_BSHK: Array,
    lse_BSH: Array,
    gradient_BSHK: Array,
) -> tuple[Array, Array, Array]:
    groups = k_BSGK.shape[2]
    device = halves.this_device(scores, q_BSHK, groups, ids_BS)
    finished_2 = halves.finished(out_BSHK, lse_BSH, gradient_BSHK, groups)
    chunks = _gathered(k_BSGK, v_BSGK, ids_BS)

    def meet(carry: tuple[Array, tuple[Array, Array]], slot: Array) -> tuple[tuple[Array, tuple[Array, Array]], None]:
        of_q_2, of_keys_N = carry
        half, keys, chunk = _pair(device, slot, chunks)
        of_q_2, added = device.pull(of_q_2, finished_2, half, keys, chunk)
        place = jnp.maximum(chunk, 0)
        of_k, of_v = (total.at[place].add(more) for total, more in zip(of_keys_N, added, strict=True))
        return (of_q_2, (of_k, of_v)), None

    none_N = jnp.zeros(chunks[0].shape, jnp.float32)
    none_2 = jnp.zeros(device.queries_2.q_BGRSK.shape, jnp.float32)
    slots = jnp.arange(context.gather_slots(device.context, device.reach))
    (of_q_2, of_keys_N), _ = jax.lax.scan(meet, (none_2, (none_N, none_N)), slots)
    of_k, of_v = (halves.united_keys(_scattered(x)).astype(k_BSGK.dtype) for x in of_keys_N)
    return halves.united_queries(of_q_2).astype(q_BSHK.dtype), of_k, of_v


def _gathered(k_BSGK: Array, v_BSGK: Array, ids_BS: Array | None) -> tuple[Array, Array, Array | None]:
    """Keys, values (N, B, G, c, K) and ids (N, B, c) of the whole row, by chunk."""

    def whole(x_2: Array) -> Array:
        x_C2 = jax.lax.all_gather(x_2, AXIS, axis=0)
        return jnp.concatenate([x_C2[:, context.EARLY], x_C2[::-1, context.LATE]])

    ids_2 = halves.of_ids(ids_BS)
    return whole(halves.of_keys(k_BSGK)), whole(halves.of_keys(v_BSGK)), None if ids_2 is None else whole(ids_2)


def _scattered(x_N: Array) -> Array:
    """The sum over all devices of the chunks that are this device's, (2, ...)."""
    size = x_N.shape[0] // 2
    x_C2 = jnp.stack([x_N[:size], x_N[: size - 1 : -1]], axis=1)
    return jax.lax.psum_scatter(x_C2, AXIS, scatter_dimension=0, tiled=False)


def _pair(device: Device, slot: Array, chunks: tuple[Array, Array, Array | None]) -> tuple[Array, Keys, Array]:
    half, chunk = context.gather_pair(device.index, slot, device.context, device.reach)
    place = jnp.maximum(chunk, 0)
    k_N, v_N, ids_N = chunks
    keys = Keys(k_N[place], v_N[place], halves.positions(chunk, device.chunk), None if ids_N is None else ids_N[place])
    return half, keys, chunk


GATHER = Walk(_walk, _walk_back)
