"""Attention by cuDNN's flash kernel, through `jax.nn.dot_product_attention`.

Called by `attention.py` on one device's rows and heads. Read next: `attention_xla.py`, whose mask it shares.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.ops.attention_xla import position_mask, segment_mask


def refusal(*, length: int, head_dim: int, dtype: str, softcap: float, packed: bool) -> str:
    """Why cuDNN cannot compute this; empty if it can, as far as it can be known without the GPU."""
    if softcap:
        return f"cuDNN attention has no soft-cap and the model's is {softcap}; set the model's attention soft-cap to 0"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention computes bfloat16 and float16, not {dtype}; set precision.compute=bfloat16"
    if head_dim % 8 or head_dim > 256:
        return f"cuDNN attention needs a head dim that is a multiple of 8 and at most 256, not {head_dim}"
    if packed and length % 2:
        return f"cuDNN attention with segment ids needs rows of an even length, not {length}"
    return ""


def local_attention(
    q_BSHK: Array, k_BTGK: Array, v_BTGK: Array, segment_ids_BS: Array | None, *, window: int, softcap: float
) -> Array:
    """Causal attention within segments; same contract as `attention.attention`, on local arrays.

    With segment ids the mask is a tensor (B, 1, S, S), which cuDNN adds to the scores as a bias: correct for any
    packing, at 2 * B * S^2 bytes. Some cuDNN releases refuse a window beside a bias: the mask then carries it.
    """
    assert not softcap, "refused by attention.supports"
    mask_B1ST, band = None, (window - 1, 0) if window else None
    if segment_ids_BS is not None:
        positions = jnp.arange(q_BSHK.shape[1])
        same = segment_mask(segment_ids_BS, segment_ids_BS)
        mask_B1ST, band = (same & position_mask(positions, positions, window))[:, None], None
    return jax.nn.dot_product_attention(
        q_BSHK, k_BTGK, v_BTGK, mask=mask_B1ST, is_causal=True, local_window_size=band, implementation="cudnn"
    )
