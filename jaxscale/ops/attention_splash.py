"""Attention by the splash kernel of JAX (Pallas, TPU): never holds a score matrix, skips blocks the mask empties.

Called by `attention.py` on one device's rows and heads. The kernel is written for TPU; elsewhere it only lowers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

LANES = 128
"""The kernel's blocks are multiples of a TPU vector register's lanes."""

BLOCKS = (512, 384, 256, 128)
"""Block lengths of queries and keys, best first: large blocks keep the matrix units busy and still fit in VMEM."""


def refusal(*, length: int, head_dim: int, dtype: str) -> str:
    """Why splash cannot compute this; empty if it can. Segments, windows and soft-caps it all has."""
    if dtype not in ("bfloat16", "float32"):
        return f"the splash kernel computes bfloat16 and float32, not {dtype}; set precision.compute=bfloat16"
    if length % LANES:
        near = max(LANES, length // LANES * LANES)
        return f"the splash kernel needs rows of a multiple of {LANES} positions, not {length}; use for example {near}"
    if head_dim % 64:
        near = max(64, head_dim // 64 * 64)
        return f"the splash kernel needs a head dim that is a multiple of 64, not {head_dim}; use for example {near}"
    return ""


def local_attention(
    q_BSHK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    segment_ids_BS: Array | None,
    *,
    window: int,
    softcap: float,
    interpret: bool = False,
) -> Array:
    """Causal attention within segments; same contract as `attention.attention`, on local arrays.

    `interpret` runs the kernel's program on any platform, slowly, to test it.
    """
    # Pallas takes a second to import and is needed on TPU only.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, S, H, K = q_BSHK.shape
    head_mask: masks.Mask = masks.LocalMask((S, S), (window - 1, 0), 0) if window else masks.CausalMask((S, S))
    block = next(size for size in BLOCKS if S % size == 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([head_mask] * H),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(*(block,) * 8),
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )

    def one_row(q_HSK: Array, k_GTK: Array, v_GTK: Array, ids_S: Array | None) -> Array:
        return kernel(q_HSK, k_GTK, v_GTK, segment_ids=None if ids_S is None else kernels.SegmentIds(ids_S, ids_S))

    q_BHSK, k_BGTK, v_BGTK = (
        x.transpose(0, 2, 1, 3) for x in (q_BSHK * jnp.asarray(K**-0.5, q_BSHK.dtype), k_BTGK, v_BTGK)
    )
    in_axes = (0, 0, 0, None if segment_ids_BS is None else 0)
    out_BHSK = jax.vmap(one_row, in_axes=in_axes)(q_BHSK, k_BGTK, v_BGTK, segment_ids_BS)
    return out_BHSK.transpose(0, 2, 1, 3).astype(q_BSHK.dtype)
