"""A recipe for worlds of processes: `lm_nano` with hooks, and with a loss that is no number in the rows of one step.

`--model.first` and `--model.last` are these rows; with equal ones nothing is poisoned.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import Hooks, load_recipe, run

NANO = Path(__file__).resolve().parents[2] / "recipes" / "lm_nano.py"


class PoisonedTask:
    """A task whose loss or its slope is no number, or whose loss is very large, in batches with certain rows."""

    def __init__(self, task, model):
        self._task, self._model = task, model

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, params, batch, key):
        total, sums = self._task.loss(params, batch, key)
        here = jnp.any((batch["row"] >= self._model.first) & (batch["row"] < self._model.last))
        if self._model.slope_only:
            edge = jnp.sqrt(jnp.where(here, 0.0 * total, 1.0))  # the slope of the root of 0, times 0, is no number
            return total + edge - jax.lax.stop_gradient(edge), sums
        factor = jnp.where(here, jnp.float32(self._model.factor or math.nan), 1.0)
        return total * factor, {**sums, "loss": sums["loss"] * factor}


@dataclass(frozen=True)
class PoisonedConfig(TransformerConfig):
    first: int = 0
    """First row whose batch has a loss that is no number."""
    last: int = 0
    """The row after the last one."""
    factor: float = 0.0
    """By which the loss is multiplied there; 0 stands for NaN, which no config may hold."""
    slope_only: bool = False
    """The loss stays as it is and its gradient is NaN."""

    def task(self, config):
        return PoisonedTask(super().task(config), self)


def config():
    nano = load_recipe(NANO).config
    fields = {field.name: getattr(nano.model, field.name) for field in dataclasses.fields(nano.model)}
    return dataclasses.replace(nano, name="poisoned", model=PoisonedConfig(**fields))


def hooks(_):
    return Hooks(step_metrics=spaces, evaluations={"mine": first_batch})


def spaces(params, batch):
    """The share of tokens that are spaces, and a weight as it was before the update."""
    weight = batch["loss_weight"]
    return {"spaces": jnp.sum((batch["tokens"] == 32) * weight), "scale": params["norm"]["scale"][0] * weight.sum()}


def first_batch(context):
    """The loss of the first held-out batch, by a program of the recipe's own, and how many batches there are."""

    @jax.jit
    def mean(params, batch):
        _, sums = context.task.loss(params, batch, None)
        return sums["loss"] / batch["loss_weight"].sum()

    batches = list(context.batches())
    return {"loss": mean(context.params, batches[0]), "batches": len(batches)}


if __name__ == "__main__":
    run(__file__)
