"""A recipe's own metrics and evaluations: what they may return, and how it joins what the run computes itself.

What can be known from shapes alone is refused before a run leaves any trace; the results of an evaluation are looked at
when they come. Read next: `recipe.py`, which defines hooks; `metrics.py` has the names that are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxscale import axes
from jaxscale.config import Config, ConfigError
from jaxscale.data.position import phases
from jaxscale.data.source import abstract_batch
from jaxscale.parallel.pipeline import stages
from jaxscale.recipe import EvaluationContext, Hooks
from jaxscale.task import Batch, Params, Task
from jaxscale.train.metrics import is_reserved

STEP_METRICS = "hooks.step_metrics"


class HookError(RuntimeError):
    """An evaluation of the recipe returned what no line of metrics.jsonl can hold."""


def with_step_metrics(task: Task, hooks: Hooks) -> Task:
    """The task with `hooks.step_metrics` in its metrics, or the task itself where there are none."""
    return task if hooks.step_metrics is None else _Hooked(task, hooks)


class _Hooked:  # hashed by identity: one for each run
    def __init__(self, task: Task, hooks: Hooks) -> None:
        self._task, self._hooks = task, hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The task's loss and metrics, and the user's sums beside them. Raises ConfigError for what cannot be one."""
        total, metrics = self._task.loss(params, batch, key)
        return total, {**metrics, **self.own(params, batch, metrics)}

    def own(self, params: Params, batch: Batch, taken: Collection[str]) -> dict[str, jax.Array]:
        """The user's sums alone. taken: names of the task's own. Raises ConfigError."""
        assert self._hooks.step_metrics is not None
        own: Any = self._hooks.step_metrics(jax.lax.stop_gradient(params), batch)
        if wrong := _wrong(own, "a sum weighted by loss_weight"):
            raise ConfigError(f"{STEP_METRICS} {wrong}")
        evaluations = tuple(f"{name}/" for name in self._hooks.evaluations)
        for name in own:
            if name in taken or is_reserved(name):
                raise ConfigError(f"{STEP_METRICS} returns {name!r}, which a line of metrics.jsonl has; rename it")
            if name.startswith(evaluations):
                raise ConfigError(f"{STEP_METRICS} returns {name!r}, a name of one of hooks.evaluations; rename it")
        return {name: jnp.float32(value) for name, value in own.items()}


def step_metrics_of(task: Task, params: Params, parts: Batch, taken: Collection[str]) -> dict[str, jax.Array]:
    """The user's sums over all microbatches, for a step that does not go through `task.loss`; none without such hooks.

    parts: the microbatches, stacked. taken: names of the task's own metrics.
    """
    if not isinstance(task, _Hooked):
        return {}
    each = jax.lax.map(lambda part: task.own(params, part, taken), dict(parts))
    return {name: values.sum() for name, values in each.items()}


def check_hooks(task: Task, hooks: Hooks, params: Params, batches: Iterable[Mapping[str, Any]]) -> None:
    """Raises ConfigError for hooks that cannot work, without computing anything.

    task: of `with_step_metrics`; params, batches: `jax.ShapeDtypeStruct`s, one batch of each shape that is trained on.
    """
    if not isinstance(hooks.evaluations, Mapping):
        raise ConfigError(f"hooks.evaluations is {hooks.evaluations!r}; give a dict from names to functions")
    for name, evaluation in hooks.evaluations.items():
        if not (isinstance(name, str) and name):
            raise ConfigError(f"hooks.evaluations has the name {name!r}; use a text that is not empty")
        if not callable(evaluation):
            raise ConfigError(f"hooks.evaluations[{name!r}] is {evaluation!r}; give a function of an EvaluationContext")
        if is_reserved(f"{name}/"):
            raise ConfigError(f"hooks.evaluations has the name {name!r}, under which metrics.jsonl has other fields")
    if hooks.step_metrics is None:
        return
    if not callable(hooks.step_metrics):
        raise ConfigError(f"{STEP_METRICS} is {hooks.step_metrics!r}; give a function of (params, batch)")
    for batch in batches:
        # Pipeline stages want all microbatches of a step, and the user's function sees one of them at a time.
        if isinstance(task, _Hooked) and stages() > 1:
            jax.eval_shape(lambda params, batch: task.own(params, batch, ("loss",)), params, batch)
        else:
            jax.eval_shape(lambda params, batch: task.loss(params, batch, None), params, batch)


def abstract_batches(config: Config, mesh: Mesh) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """One microbatch of each shape that the run trains on, as `jax.ShapeDtypeStruct`s with shardings."""
    found: list[dict[str, jax.ShapeDtypeStruct]] = []
    parts, shards = config.train.microbatches, axes.batch_shards(mesh.shape)
    for batch, sequence in dict.fromkeys((phase.batch, phase.sequence) for phase in phases(config)):
        rows = axes.padded_batch(batch, parts, shards) // parts
        found.append(abstract_batch(config.model.layout(sequence), rows, mesh))
    return found


def run_evaluations(hooks: Hooks, context: EvaluationContext, before: Callable[[], None]) -> dict[str, float]:
    """The results of all evaluations, `x` of the evaluation `name` as `name/x`. Raises HookError.

    before: called before each of them, and may raise.
    """
    results: dict[str, float] = {}
    for name, evaluation in hooks.evaluations.items():
        before()
        own: Any = evaluation(context)
        if wrong := _wrong(own, "one number"):
            raise HookError(f"the evaluation {name!r} of the recipe's hooks, after step {context.step}, {wrong}")
        for key, value in own.items():
            if (path := f"{name}/{key}") in results:
                raise HookError(
                    f"the evaluation {name!r} of the recipe's hooks, after step {context.step}, returns {key!r}, but "
                    f"another evaluation has written {path!r}; rename one of them"
                )
            results[path] = float(value)
    return results


def _wrong(results: object, wanted: str) -> str:
    """What is wrong with what a hook returned, as the end of a sentence; empty where nothing is."""
    if not isinstance(results, Mapping):
        return f"returns {type(results).__name__}; return a dict from names to numbers"
    for name, value in results.items():
        if not (isinstance(name, str) and name):
            return f"returns a value under the name {name!r}; use a text that is not empty"
        if isinstance(value, int | float):
            continue
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is None or dtype is None:
            return f"returns {name!r} as {type(value).__name__}; return {wanted}"
        if shape != ():
            return f"returns {name!r} of shape {tuple(shape)}; return {wanted}, of shape ()"
        real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
        if not real:
            return f"returns {name!r} of dtype {dtype}; return {wanted}"
    return ""
