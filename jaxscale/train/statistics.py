"""Metrics that a run asks for: per-layer statistics and the gradient-noise scale. Pure, traced inside the step.

Read next: `train/loop.py`, which writes them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.config import Config
from jaxscale.optim.clip import norm_of, sum_of_squares
from jaxscale.optim.scaling import noise_scale
from jaxscale.task import LOAD, PER_LAYER, Params, Task
from jaxscale.tree import flatten, unflatten

LAYERS = PER_LAYER
"""Prefix of metrics that hold one number per layer, or more; written every `run.layer_stats_every` steps."""


def extra_metrics(
    config: Config,
    task: Task,
    metrics: dict[str, jax.Array],
    squares: dict[str, jax.Array],
    old: Params,
    new: Params,
) -> dict[str, jax.Array]:
    """What the config turns on, from values the step has anyway.

    noise_scale: tokens in the batch around which larger ones stop paying; average noise_trace and signal over steps for
    a steadier figure (`optim/scaling.py`). squares: sums of squared gradients by path, (layers,) for stacked weights.
    imbalance: with experts, the largest load of a layer's experts to their mean, in the mean over layers.
    Layer statistics: norms of gradient, weight and update by parameter and layer.
    """
    extra: dict[str, jax.Array] = {}
    if config.train.noise_scale:
        # In units of one microbatch first, then in tokens: the number of tokens is known inside the program only.
        parts = metrics.pop("parts")
        estimate = noise_scale(metrics.pop("part_square"), norm_of(squares) ** 2, 1, parts)
        tokens = metrics["tokens"] / parts
        extra |= {"signal": estimate["signal"]}
        extra |= {name: estimate[name] * tokens for name in ("noise_trace", "noise_scale")}
    if LOAD in metrics:
        load = metrics[LOAD]
        extra["imbalance"] = jnp.mean(jnp.max(load, axis=1) / jnp.mean(load, axis=1))
    if config.run.layer_stats_every:
        change = jax.tree.map(lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), old, new)
        kinds: dict[str, Any] = {
            "gradient": squares,
            "weight": sum_of_squares(new, task.parameters),
            "update": sum_of_squares(change, task.parameters),
        }
        for kind, by_path in kinds.items():
            # In the model's order of layers, and whole on every device, whatever pipeline stages they are on.
            stored = by_path if task.stored_layout is None else flatten(task.stored_layout.store(unflatten(by_path)))
            extra |= {
                f"{LAYERS}{kind}/{path}": jax.reshard(jnp.sqrt(square), jax.P(*[None] * square.ndim))
                for path, square in stored.items()
            }
    return extra
