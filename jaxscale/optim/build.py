"""Config -> optimizer: one update rule per parameter, the schedule, decoupled weight decay.

The state is one nested dict of float32 arrays, `<slot>/<path of the parameter>`: `mu/layers/attention/q`. The step is
an argument, never part of the state. Clipping comes before (`clip.py`). Read next: `rules.py`, then `muon.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import tree
from jaxscale.config import OptimConfig
from jaxscale.optim import groups
from jaxscale.optim.muon import Muon
from jaxscale.optim.rules import Adafactor, Adam, Momentum, Rule, Sign, Slots
from jaxscale.optim.schedules import make_schedule
from jaxscale.task import Parameter, Params


@dataclass(frozen=True)
class Optimizer:
    """Pure functions; all trees are nested dicts and may be traced.

    `init(params)`: the state before step 0. Slots of a parameter are float32 and sharded like it (Adafactor's factors
    like the dims they keep). A slot that no parameter needs is absent, so plain SGD has `{}`.
    `update(grads, state, params, step)`: float32 updates, to be added to the parameters (`apply_updates`): they contain
    the learning rate and the weight decay. Also the new state. `step` is the 0-based int32 step. To skip a step the
    caller keeps the old state and drops the updates.
    `learning_rate(step)`: float32 scalar; `share(step)`: of its peak.
    """

    init: Callable[[Params], dict[str, Any]]
    update: Callable[[Params, dict[str, Any], Params, jax.Array], tuple[dict[str, Any], dict[str, Any]]]
    learning_rate: Callable[[jax.typing.ArrayLike], jax.Array]
    share: Callable[[jax.typing.ArrayLike], jax.Array]


def make_optimizer(optim: OptimConfig, parameters: Mapping[str, Parameter], steps: int) -> Optimizer:
    """The optimizer that `optim` names, for the parameters of a task and a run of `steps` updates.

    Decay is decoupled (Loshchilov and Hutter 2019): new = old - rate * (direction + weight_decay * old), the latter
    only for weights (`groups.decays`). Embedding tables are left out: `train/tables.py` updates them.
    `init` and `update` raise ValueError for trees whose paths are not those of `parameters`.
    """
    parameters = {path: parameter for path, parameter in parameters.items() if not parameter.sparse}
    share = make_schedule(optim, steps)
    rules = {path: _rule(optim, parameter) for path, parameter in parameters.items()}

    def init(params: Params) -> dict[str, Any]:
        leaves = _checked(tree.flatten(params), parameters)
        return _nested({path: rules[path].init(leaf) for path, leaf in leaves.items()})

    def update(
        grads: Params, state: dict[str, Any], params: Params, step: jax.typing.ArrayLike
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        weights, gradients = (_checked(tree.flatten(t), parameters) for t in (params, grads))
        slots = _by_path(state, parameters)
        step = jnp.asarray(step, jnp.int32)
        rate_share = share(step)
        updates: dict[str, jax.Array] = {}
        new_slots: dict[str, Slots] = {}
        for path, parameter in parameters.items():
            direction, new_slots[path] = rules[path].direction(gradients[path].astype(jnp.float32), slots[path], step)
            if optim.weight_decay and groups.decays(parameter):
                direction = direction + optim.weight_decay * weights[path].astype(jnp.float32)
            updates[path] = -(parameter.sign_step or _peak(optim, parameter) * rate_share) * direction
        return tree.unflatten(updates), _nested(new_slots)

    return Optimizer(init, update, lambda step: optim.learning_rate * share(step), share)


def apply_updates(params: Params, updates: dict[str, Any]) -> Params:
    """params + updates: added in float32, kept in each parameter's dtype and sharding."""
    return jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)


def _rule(optim: OptimConfig, parameter: Parameter) -> Rule:
    if parameter.sign_step:
        return Sign()
    if optim.name == "sgd":
        return Momentum(optim.momentum)
    if optim.name == "adafactor":
        return Adafactor(groups.stack_dims(parameter), groups.matrix_sides(parameter))
    if optim.name == "muon" and groups.is_hidden_matrix(parameter):
        assert parameter.matrix_dims is not None
        return Muon(optim.momentum, parameter.matrix_dims)
    return Adam(optim.b1, optim.b2, optim.epsilon)


def _peak(optim: OptimConfig, parameter: Parameter) -> float:
    adam_part = optim.name == "muon" and not groups.is_hidden_matrix(parameter)
    return optim.adam_learning_rate if adam_part else optim.learning_rate


def _checked(leaves: dict[str, Any], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    if odd := sorted(leaves.keys() ^ parameters.keys()):
        raise ValueError(
            f"the optimizer was made for other parameters: {', '.join(odd)} only on one side; "
            "make it from this task's table"
        )
    return leaves


def _nested(slots: Mapping[str, Slots]) -> dict[str, Any]:
    """{path: {slot: array}} -> {slot: nested dict}."""
    return tree.unflatten({f"{name}/{path}": leaf for path, own in slots.items() for name, leaf in own.items()})


def _by_path(state: dict[str, Any], parameters: Mapping[str, Parameter]) -> dict[str, Slots]:
    """The way back: {slot: nested dict} -> {path: {slot: array}}."""
    slots: dict[str, Slots] = {path: {} for path in parameters}
    for name, branch in state.items():
        for path, leaf in tree.flatten(branch).items():
            slots[path][name] = leaf
    return slots
