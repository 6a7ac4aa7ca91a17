"""Random numbers from (root key, step, global row), never from a rank: any mesh and any world draws the same.

Read next: `train/step.py`, which folds the step into the root key.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale import axes


def named_key(key: jax.Array, name: str) -> jax.Array:
    """A key for this name: parameters get theirs by path, so adding one changes no other."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def dropout(
    x_BSD: jax.Array, rate: float, key: jax.Array, row_B: jax.Array, order: np.ndarray | None = None
) -> jax.Array:
    """Zeroes a share `rate` of `x_BSD` (batch, sequence, width) and scales the rest, with a key for each global row.

    The mask of a row does not depend on the device, the microbatch or the batch that the row is in; nor on the order
    that its positions lie in: `order` says which position is where (None: the row's own).
    """
    residual = axes.spec("act_batch", "act_residual_sequence", "act_embed")

    def row_mask(row: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, row), 1.0 - rate, x_BSD.shape[1:])

    keep = jax.vmap(row_mask)(row_B)
    if order is not None:
        keep = keep.at[:, order].get(out_sharding=jax.typeof(keep).sharding.spec)
    keep = jax.reshard(keep, residual)
    return jnp.where(keep, x_BSD / (1.0 - rate), 0).astype(x_BSD.dtype)
