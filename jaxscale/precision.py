"""Dtypes by name, resolved once: weights are stored, matmuls computed and gradients reduced in different dtypes.

Read next: `layers/linear.py`, where the three meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxscale.config import PrecisionConfig


@dataclass(frozen=True)
class Precision:
    """`weights`: storage of parameters; `compute`: matmul operands; `reduce`: sums of gradients over devices.

    `matmul`: a name of `ops.quantised.PRODUCTS`, for the products of layers.
    """

    weights: DTypeLike
    compute: DTypeLike
    reduce: DTypeLike
    matmul: str = "compute"


def resolve(config: PrecisionConfig) -> Precision:
    return Precision(
        weights=jnp.dtype(config.weights),
        compute=jnp.dtype(config.compute),
        reduce=jnp.dtype(config.reduce),
        matmul=config.matmul,
    )
