"""Loss and gradients of a batch, in one piece or as microbatches, always as one mean over the whole batch's tokens.

Each part's loss is a weighted sum; it is divided by the weight of the *whole* batch, so parts of different weight add
up to the same mean (a mean of means would not). Read next: `train/step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxscale.optim.clip import sum_of_squares
from jaxscale.parallel import pipeline
from jaxscale.parallel.microbatches import join, split
from jaxscale.parallel.slices import total
from jaxscale.parallel.zero import held
from jaxscale.task import Batch, LayeredTask, Params, Task
from jaxscale.train.hooks import step_metrics_of
from jaxscale.train.tables import TABLES, with_bags

Sums = dict[str, jax.Array]
NO_BAGS: Mapping[str, jax.Array] = MappingProxyType({})


def loss_and_gradients(
    task: Task,
    params: Params,
    batch: Batch,
    key: jax.Array,
    microbatches: int,
    noise: bool,
    bags: Mapping[str, jax.Array] = NO_BAGS,
    kept: Params | None = None,
) -> tuple[Sums, Params]:
    """Mean metrics over the batch's tokens and the gradients of the mean loss.

    Metrics are float32 scalars, `loss` among them, and arrays (layers, ...) under names that say so (`task.PER_LAYER`).
    batch: arrays (rows, ...), rows sharded over (data, fsdp, expert); row r is in microbatch r mod `microbatches`.
    Where a surrounding region is manual over `data` (`parallel/slices.py`), the batch is one slice's, the metrics are
    still those of all slices, and the gradients are this slice's share: they add up over the slices.
    With `noise`, the metrics also hold `part_square`, the mean squared gradient norm of single microbatches, and
    `parts`, how many there are: those that have no weight (padding, say) have no gradient and do not count. `bags`:
    what was looked up in tables for the batch; its gradient, (rows, ...) too, comes under `tables`, if there are any.
    kept: the weights in the form they are kept in, where it is another one; `params` are then `zero.differentiable`.
    """
    weight = total(batch["loss_weight"].sum())
    if pipeline.stages() > 1:
        layered = cast("LayeredTask", task)  # the audit refuses stages for a task without layers
        parts = split(batch, microbatches)
        metrics, gradients = pipeline.loss_and_gradients(layered, params, parts, key, weight)
        own = {name: value / weight for name, value in step_metrics_of(task, params, parts, metrics).items()}
        return {**total({**metrics, **own}), "tokens": weight}, gradients

    def part_loss(both: tuple[Params, Batch], part: Batch) -> tuple[jax.Array, Sums]:
        params, looked_up = both
        total, metrics = task.loss(params if kept is None else held(kept, params), with_bags(part, looked_up), key)
        return total / weight, {name: value / weight for name, value in metrics.items()}

    grad = jax.grad(part_loss, has_aux=True)
    if microbatches == 1:
        (gradients, of_bags), metrics = grad((params, dict(bags)), batch)
        return {**total(metrics), "tokens": weight}, _with_tables(gradients, of_bags)

    def add_part(total: tuple[Any, Params], both: tuple[Batch, Batch]) -> tuple[tuple[Any, Params], Batch]:
        part, looked_up = both
        (gradients, of_bags), metrics = grad((params, looked_up), part)
        if noise:  # of the part's own mean gradient, hence the ratio of weights
            mine = part["loss_weight"].sum()
            ratio = jnp.where(mine > 0, weight / jnp.where(mine > 0, mine, 1), 0)
            metrics |= {"part_square": ratio**2 * _square(gradients, task), "parts": (mine > 0).astype(jnp.float32)}
        return jax.tree.map(jnp.add, total, (metrics, gradients)), of_bags

    both = split(batch, microbatches), split(bags, microbatches)
    first, first_bags = ({name: value[0] for name, value in parts.items()} for parts in both)
    metric_shapes = jax.eval_shape(lambda: part_loss((params, first_bags), first)[1])
    zeros = {name: jnp.zeros(value.shape, jnp.float32) for name, value in metric_shapes.items()}
    zeros |= {name: jnp.float32(0) for name in (("part_square", "parts") if noise else ())}
    # In float32 whatever the weights are: added up in bfloat16, the later of many parts would be rounded away.
    none = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    (metrics, gradients), of_bags = jax.lax.scan(add_part, (zeros, none), both)
    if noise:
        metrics["part_square"] /= metrics["parts"]
    return {**total(metrics), "tokens": weight}, _with_tables(gradients, join(of_bags))


def _with_tables(gradients: Params, of_bags: Batch) -> Params:
    return {**gradients, TABLES: dict(of_bags)} if of_bags else gradients


def _square(gradients: Params, task: Task) -> jax.Array:
    squares = sum_of_squares(gradients, task.parameters)
    return jnp.sum(jnp.stack([jnp.sum(s) for s in squares.values()]))
