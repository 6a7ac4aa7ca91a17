"""Arrays in the hosts' memory: which parts of a state lie there (`state.offload`), and the moves there and back.

Pinned host memory is reached by each device's own transfers, without a processor of the host. An array's memory is part
of its type (`float32<host>[...]`), so a program says by itself what it moves:

    opt, ema   moved to the devices for the update and back behind it, one parameter after the other
    params     weights of the layers: a layer's are moved when it multiplies, forward and backward (`parallel/zero.py`)

Activations are offloaded by `remat.py`. Read next: `parallel/zero.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxscale import axes, tree
from jaxscale.config import Config, ConfigError
from jaxscale.task import Parameter

HOST = "pinned_host"
"""Memory kind of arrays that devices reach in the host's memory."""

State = dict[str, Any]


def check(config: Config, devices: Iterable[jax.Device]) -> None:
    """Raises ConfigError where something is to be offloaded and a device does not reach its host's memory."""
    wanted = {"state.offload": config.state.offload, "remat.offload": config.remat.offload}
    if config.remat.policy == "offload":
        wanted["remat.policy"] = ("offload",)
    asked = [f"{name} {','.join(values)}" for name, values in wanted.items() if values]
    for device in devices if asked else ():
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise ConfigError(
                f"{', '.join(asked)} needs memory of kind {HOST}, and {device.device_kind} devices have "
                f"{', '.join(kinds)}; leave it out here"
            )


def to_host[Tree](values: Tree) -> Tree:
    """The same arrays in the hosts' memory; inside a program."""
    return jax.tree.map(lambda x: x if is_on_host(x) else jax.device_put(x, jax.memory.Space.Host), values)


def to_device[Tree](values: Tree) -> Tree:
    """The same arrays in the devices' memory; inside a program."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x, values)


def fetched_after[Tree](done: jax.Array, values: Tree) -> Tree:
    """`to_device`, begun only when `done` is computed: else compilers fetch everything as early as they can, and what
    was to be out of the devices' memory is there all the time. Inside a program.
    """
    if not any(map(is_on_host, jax.tree.leaves(values))):
        return values
    ready, _ = jax.lax.optimization_barrier((values, done))
    return to_device(ready)


def is_on_host(x: Any) -> bool:
    """Of an array, a traced one, or the shape of one with its sharding."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding is not None and x.sharding.memory_kind == HOST
    return bool(jax.typeof(x).memory_space == jax.memory.Space.Host)


def offload(config: Config, parameters: Mapping[str, Parameter], state: State) -> State:
    """A state, or some of its entries, with what `state.offload` names in the hosts' memory. Inside a program."""
    return _mapped(config, parameters, state, to_host)


def declare(config: Config, parameters: Mapping[str, Parameter], shapes: State) -> State:
    """The same for `jax.ShapeDtypeStruct`s with shardings: `jax.eval_shape` forgets memories."""
    return _mapped(config, parameters, shapes, lambda x: x.update(sharding=x.sharding.with_memory_kind(HOST)))


def in_memory_of(others: Mapping[str, Any], values: Mapping[str, Any]) -> State:
    """`values`, arrays or `jax.ShapeDtypeStruct`s, each in the memory of its namesake. Outside of programs."""
    kinds = {path: x.sharding.memory_kind for path, x in tree.flatten(dict(others)).items() if x.sharding is not None}

    def placed(path: str, x: Any) -> Any:
        if path not in kinds or x.sharding.memory_kind == kinds[path]:
            return x
        sharding = x.sharding.with_memory_kind(kinds[path])
        return x.update(sharding=sharding) if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x, sharding)

    return tree.unflatten({path: placed(path, x) for path, x in tree.flatten(dict(values)).items()})


def bytes_on_host(shapes: State) -> int:
    """Bytes of a state that lie in host memory, for each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes) if is_on_host(x)
    )


def is_streamed(parameter: Parameter) -> bool:
    """Whether a parameter's layers can be moved one by one: stacked weights of products, that are stored in shards."""
    return parameter.axes[:1] == ("layers",) and axes.spec(*parameter.axes) != axes.gathered_spec(parameter.axes)


def _mapped(config: Config, parameters: Mapping[str, Parameter], state: State, move: Callable[[Any], Any]) -> State:
    def is_named(path: str) -> bool:
        entry, _, rest = path.partition("/")
        return entry in config.state.offload and (entry != "params" or is_streamed(parameters[rest]))

    named: State = {name: state[name] for name in state if name in config.state.offload}
    moved = {path: move(leaf) if is_named(path) else leaf for path, leaf in tree.flatten(named).items()}
    return {**state, **tree.unflatten(moved)}
