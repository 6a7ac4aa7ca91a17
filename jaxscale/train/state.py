"""The state of a run: one nested dict of arrays. Host integers (`step`, `row`) live beside it, in a `Record`.

    params/...    weights                       opt/...    optimizer slots, by parameter path
    ema/...       moving average (if kept)      key        random root, uint32 key data
    skipped       int32, updates not applied    window     float32, last finite losses (guard)
    tables/...    embedding tables (of a task that has them) and their accumulators
    across/...    unsent gradients of each slice (where gradients are compressed)
    local/...     weights and optimizer slots of each slice (where slices train on their own)

Read next: `train/step.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.axes import abstract_mesh
from jaxscale.config import Config
from jaxscale.host_memory import declare, offload
from jaxscale.optim.build import Optimizer, make_optimizer
from jaxscale.optim.ema import init_ema
from jaxscale.parallel.gradient_exchange import init_across
from jaxscale.parallel.local_sgd import init_local
from jaxscale.parallel.zero import as_shards, as_stored, gradient_shapes
from jaxscale.task import Params, Task
from jaxscale.train.guard import empty_window
from jaxscale.train.summary import bytes_per_device
from jaxscale.train.tables import init_tables

State = dict[str, Any]


def init_state(config: Config, task: Task, optimizer: Optimizer, params: Params | None = None) -> State:
    """State before step 0, on the current mesh: every leaf sharded by the rules. Traceable.

    params: weights to start from (`--init-from`); None draws them from the seed.
    """
    root = jax.random.key(config.seed)
    params = task.init(jax.random.fold_in(root, 0)) if params is None else params
    params, tables = init_tables(task, params)
    params = as_shards(task.parameters, params)
    state = {
        "params": as_stored(config.state.zero, task.parameters, params),
        **(init_local(config, optimizer, params) if config.local.every else {"opt": optimizer.init(params)}),
        **({"ema": init_ema(params)} if config.optim.ema else {}),
        **tables,
        **init_across(config.across, task, jax.random.fold_in(root, 2)),
        "key": jax.random.key_data(jax.random.fold_in(root, 1)),
        "skipped": jnp.int32(0),
        "window": empty_window(config.train.spike_window),
    }
    return offload(config, task.parameters, state)


@functools.lru_cache(maxsize=1)
def make_init(config: Config, task: Task, optimizer: Optimizer) -> Callable[..., State]:
    """`init_state` as a program of its optional `params`. One for each run: its shapes and its values share a trace."""
    return jax.jit(functools.partial(init_state, config, task, optimizer))


_known: dict[Config, State] = {}
"""What `remember_state` found out: inherited by forked workers, which so need not trace it."""


def remember_state(config: Config) -> None:
    """Keeps the `abstract_state` of a config (with its mesh and devices) for this process and what it forks.

    Makes no backend. A recipe's hooks change nothing of it: a state depends on its config alone.
    """
    if config not in _known:
        with jax.sharding.use_abstract_mesh(abstract_mesh(dataclasses.asdict(config.mesh))):
            task = config.model.task(config)
            _known[config] = abstract_state(config, task, make_optimizer(config.optim, task.parameters, config.steps))


def abstract_state(config: Config, task: Task, optimizer: Optimizer) -> State:
    """Shapes, dtypes and shardings of the state as `jax.ShapeDtypeStruct`s, without computing anything."""
    if config in _known:
        return _known[config]
    shapes = jax.eval_shape(make_init(config, task, optimizer))
    # A constant carries no mesh in its type: in the program it is replicated.
    mesh = jax.sharding.get_mesh()
    everywhere = NamedSharding(jax.sharding.get_abstract_mesh() if mesh.empty else mesh, P())
    shapes = jax.tree.map(lambda x: x if x.sharding is not None else x.update(sharding=everywhere), shapes)
    return declare(config, task.parameters, shapes)


def state_bytes(config: Config, task: Task, abstract: State) -> dict[str, int]:
    """Bytes of an abstract state on each device, by kind, with those of the gradients of a step."""
    reduced = 4 if config.precision.reduce == "float32" else 2
    return bytes_per_device(abstract, reduced, gradient_shapes(config.state.zero, task.parameters, abstract["params"]))
