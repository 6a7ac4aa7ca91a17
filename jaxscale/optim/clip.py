"""Norms of gradients and clipping by the global norm, on sharded trees.

Every sum is over a device's own shard first: only scalars (or one number per layer) cross the network, never a tensor.
Read next: `train/step.py`, which clips before the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import tree
from jaxscale.task import Parameter


def sum_of_squares(
    values: Mapping[str, Any], parameters: Mapping[str, Parameter] | None = None
) -> dict[str, jax.Array]:
    """Path -> sum of squares, accumulated in float32: a scalar, replicated.

    With the task's `parameters`, a stacked parameter gives one number per layer instead, shape (layers,), and those
    with a `sign_step`, whose gradients have another unit, are left out.
    """
    return {
        path: _squares(leaf, 1 if parameters is not None and parameters[path].axes[:1] == ("layers",) else 0)
        for path, leaf in tree.flatten(values).items()
        if parameters is None or not parameters[path].sign_step
    }


def norm_of(squares: Mapping[str, jax.Array]) -> jax.Array:
    """Euclidean norm over all leaves together from `sum_of_squares`, per layer or not: float32 scalar, replicated."""
    return jnp.sqrt(sum((jnp.sum(square) for square in squares.values()), start=jnp.float32(0)))


def clip_by_global_norm(grads: dict[str, Any], norm: jax.Array, limit: float) -> dict[str, Any]:
    """Scales all gradients by limit / norm where the norm is above the limit (Pascanu et al. 2013); 0 = no clipping.

    Shapes, dtypes and shardings stay. What comes out for a norm that is not finite means nothing: the step looks at the
    norm and skips such updates.
    """
    if limit == 0:
        return grads
    scale = limit / jnp.maximum(norm, limit)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def _squares(leaf: jax.Array, keep: int) -> jax.Array:
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(keep, leaf.ndim)))
