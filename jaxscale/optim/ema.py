"""Exponential moving average of the weights, for evaluation and for the weights that are published.

Read next: `train/state.py`, where the average lies beside the parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.task import Params


def init_ema(params: Params) -> dict[str, Any]:
    """Float32 copy of the parameters, same paths and shardings: at step 0 the average is the weights themselves."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def update_ema(ema: dict[str, Any], params: Params, decay: float) -> dict[str, Any]:
    """decay * ema + (1 - decay) * params, elementwise in float32; `params` are the weights after the update.

    Written as a step towards the weights: with bfloat16 weights and a decay near 1 nothing is lost to rounding twice.
    """
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p.astype(jnp.float32) - e), ema, params)
