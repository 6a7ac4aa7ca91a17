"""Loss and gradients of a batch, in one piece or as microbatches, always as one mean over the whole batch's tokens.

Each part's loss is a weighted sum; it is divided by the weight of the *whole* batch, so parts of different weight add
up to the same mean (a mean of means would not). Read next: `train/step.py`.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxscale.optim.clip import sum_of_squares
from jaxscale.parallel import pipeline
from jaxscale.parallel.microbatches import split
from jaxscale.task import Batch, LayeredTask, Params, Task
from jaxscale.train.hooks import step_metrics_of

Sums = dict[str, jax.Array]


def loss_and_gradients(
    task: Task, params: Params, batch: Batch, key: jax.Array, microbatches: int, noise: bool
) -> tuple[Sums, Params]:
    """Mean metrics over the batch's tokens (float32 scalars, `loss` among them) and the gradients of the mean loss.

    batch: arrays (rows, ...), rows sharded over (data, fsdp, expert); row r is in microbatch r mod `microbatches`.
    With `noise`, the metrics also hold `part_square`, the mean squared gradient norm of single microbatches, and
    `parts`, how many there are: those that have no weight (padding, say) have no gradient and do not count.
    """
    weight = batch["loss_weight"].sum()
    if pipeline.stages() > 1:
        layered = cast("LayeredTask", task)  # the audit refuses stages for a task without layers
        parts = split(batch, microbatches)
        metrics, gradients = pipeline.loss_and_gradients(layered, params, parts, key, weight)
        own = {name: value / weight for name, value in step_metrics_of(task, params, parts, metrics).items()}
        return {**metrics, **own, "tokens": weight}, gradients

    def part_loss(params: Params, part: Batch) -> tuple[jax.Array, Sums]:
        total, metrics = task.loss(params, part, key)
        return total / weight, {name: value / weight for name, value in metrics.items()}

    grad = jax.grad(part_loss, has_aux=True)
    if microbatches == 1:
        gradients, metrics = grad(params, batch)
        return {**metrics, "tokens": weight}, gradients

    def add_part(total: tuple[Any, Params], part: Batch) -> tuple[tuple[Any, Params], None]:
        gradients, metrics = grad(params, part)
        if noise:  # of the part's own mean gradient, hence the ratio of weights
            mine = part["loss_weight"].sum()
            ratio = jnp.where(mine > 0, weight / jnp.where(mine > 0, mine, 1), 0)
            metrics |= {"part_square": ratio**2 * _square(gradients), "parts": (mine > 0).astype(jnp.float32)}
        return jax.tree.map(jnp.add, total, (metrics, gradients)), None

    parts = split(batch, microbatches)
    first = {name: value[0] for name, value in parts.items()}
    metric_shapes = jax.eval_shape(lambda: part_loss(params, first)[1])
    zeros = {name: jnp.float32(0) for name in [*metric_shapes, *(["part_square", "parts"] if noise else [])]}
    # In float32 whatever the weights are: added up in bfloat16, the later of many parts would be rounded away.
    none = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    (metrics, gradients), _ = jax.lax.scan(add_part, (zeros, none), parts)
    if noise:
        metrics["part_square"] /= metrics["parts"]
    return {**metrics, "tokens": weight}, gradients


def _square(gradients: Params) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(s) for s in jax.tree.leaves(sum_of_squares(gradients))]))
