"""RMS normalisation. Read next: `layers/attention.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x / rms(x) * scale` over the last dim, computed in float32, in x's dtype and sharding.

    x: (..., D), D not sharded; scale: (D,). Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)
