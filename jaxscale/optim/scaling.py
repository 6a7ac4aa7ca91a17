"""Learning rate and batch size: scaling one with the other, and the gradient-noise scale that hints at a useful batch.

Pure functions of numbers. Read next: `schedules.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

ScalingRule = Literal["linear", "sqrt"]


def scale_learning_rate(rate: float, batch: int, reference_batch: int, rule: ScalingRule) -> float:
    """The learning rate for `batch`, given one that works for `reference_batch` (same unit: rows or tokens).

    `linear`: rate * ratio, for SGD (Goyal et al. 2017); `sqrt`: rate * sqrt(ratio), for Adam-type optimizers, whose
    direction is already divided by the gradient's size (Malladi et al. 2022). Both hold below the gradient-noise scale.
    Raises ValueError for sizes below 1 or an unknown rule.
    """
    if batch < 1 or reference_batch < 1:
        raise ValueError(
            f"batch is {batch} and reference_batch {reference_batch}; give sizes of at least 1, in one unit"
        )
    ratio = batch / reference_batch
    if rule == "linear":
        return rate * ratio
    if rule == "sqrt":
        return rate * math.sqrt(ratio)
    raise ValueError(f"unknown rule {rule!r} for scaling a learning rate; use 'linear' (SGD) or 'sqrt' (Adam-type)")


def scaling_rule(optimizer: str) -> ScalingRule:
    """The rule for an optimizer of `OptimConfig.name`: linear for SGD, sqrt for those that normalise the gradient."""
    return "linear" if optimizer == "sgd" else "sqrt"


def noise_scale(
    small_square: jax.typing.ArrayLike,
    big_square: jax.typing.ArrayLike,
    small_batch: float,
    big_batch: float | jax.Array,
) -> dict[str, jax.Array]:
    """Gradient-noise scale from squared gradient norms at two batch sizes (McCandlish et al. 2018, appendix A.1).

    `small_square`: |G|^2 of mean gradients over `small_batch` examples, best averaged over the microbatches of a step;
    `big_square`: of the mean gradient over `big_batch` examples. Returns float32 scalars, unbiased but for the last:
    - `noise_trace`: trace of the covariance of one example's gradient, tr(S);
    - `signal`: |G|^2 of the true gradient;
    - `noise_scale`: tr(S) / |G|^2, the batch (in the same unit) around which larger batches stop paying.
    One step is noisy, and `signal` may even be negative; `noise_scale` is NaN then. Average the first two over steps
    before dividing (`useful_batch`). Raises ValueError unless small_batch < big_batch; where big_batch is an array, all
    is NaN then.
    """
    if not (isinstance(big_batch, jax.Array) or 0 < small_batch < big_batch):
        raise ValueError(f"small_batch is {small_batch} and big_batch {big_batch}; compare a small with a larger batch")
    small, big = (jnp.asarray(square, jnp.float32) for square in (small_square, big_square))
    if isinstance(big_batch, jax.Array):
        big_batch = jnp.where(big_batch > small_batch, big_batch, jnp.nan)
    signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    trace = (small - big) / (1 / small_batch - 1 / big_batch)
    return {"noise_trace": trace, "signal": signal, "noise_scale": useful_batch(trace, signal)}


def useful_batch(noise_trace: jax.typing.ArrayLike, signal: jax.typing.ArrayLike) -> jax.Array:
    """tr(S) / |G|^2 of (averaged) estimates; NaN where the signal is lost in the noise."""
    trace, signal = jnp.asarray(noise_trace, jnp.float32), jnp.asarray(signal, jnp.float32)
    return jnp.where(signal > 0, trace / jnp.where(signal > 0, signal, 1.0), jnp.nan)
