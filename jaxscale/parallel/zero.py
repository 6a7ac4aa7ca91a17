"""ZeRO: what the devices of `fsdp` share, each having a shard of it, as a choice between two specs of every weight.

    state.zero   weights   gradients   optimizer's state, moving average     what crosses `fsdp` in a step
    1            whole     whole       shards                                gradients summed, new weights gathered
    2            whole     shards      shards                                gradients scattered, new weights gathered
    3            shards    shards      shards                                weights gathered twice, gradients scattered

(Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.) A shard
has `axes.spec` of the weight's logical axes; whole is `axes.gathered_spec`, the same without `fsdp`. Whoever multiplies
reads from a weight's type how it is stored. At level 2 a weight and its gradient have different types, which autodiff
does not know: the loss then gets both forms of each weight, a `Held`, and is differentiated by the shard. Read next:
`layers/linear.py`, `train/step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import axes, tree
from jaxscale.task import Parameter, Params

Parameters = Mapping[str, Parameter]


class Held(NamedTuple):
    """A weight that each device has whole while its gradient is wanted in shards."""

    whole: jax.Array
    """What is multiplied; nothing is differentiated by it."""
    shard: jax.Array
    """The device's own part of it, with the gradient's spec; never read."""


Weight = jax.Array | Held


def as_shards(parameters: Parameters, values: Params) -> Params:
    """Weights or gradients -> the shards that the optimizer works on. From whole ones every device cuts its own."""
    return _resharded(values, {path: axes.spec(*p.axes) for path, p in parameters.items()})


def as_stored(level: int, parameters: Parameters, shards: Params) -> Params:
    """Shards of weights -> weights as the state has them; below level 3 they are gathered, in their own dtype."""
    return shards if level == 3 else _resharded(shards, _whole_specs(parameters))


def held(whole: Params, shards: Params) -> Params:
    """Both forms of each weight that has two, for a loss that is differentiated by `shards`."""

    def pair(whole: jax.Array, shard: jax.Array) -> Weight:
        same = jax.typeof(whole).sharding.spec == jax.typeof(shard).sharding.spec
        return shard if same else Held(jax.lax.stop_gradient(whole), shard)

    return jax.tree.map(pair, whole, shards)


def at_use(weight: Weight, names: tuple[str | None, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """The whole weight in `dtype`: gathered if it is stored in shards. names: its logical axes."""
    whole = weight.whole if isinstance(weight, Held) else weight
    return jax.reshard(whole.astype(dtype), axes.gathered_spec(names))


def shard_of(weight: Weight) -> jax.Array:
    """What the gradient is taken by: for those who work on shards anyway."""
    return weight.shard if isinstance(weight, Held) else weight


def gradient_spec(weight: Weight) -> P:
    """The spec in which the gradient of a weight is wanted."""
    spec: P = jax.typeof(shard_of(weight)).sharding.spec
    return spec


def gradient_of(weight: Weight, gradient: jax.Array) -> Any:
    """The result of a gradient rule for such an argument, in the weight's dtype."""
    gradient = gradient.astype(shard_of(weight).dtype)
    return Held(None, gradient) if isinstance(weight, Held) else gradient  # type: ignore[arg-type]  # None: no gradient


def gradient_shapes(level: int, parameters: Parameters, params: Params) -> Params:
    """`jax.ShapeDtypeStruct`s of the gradients of weights that are stored so, for counting bytes."""
    if level != 2:
        return params

    def one(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(leaf.sharding.mesh, axes.spec(*parameters[path].axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return tree.unflatten({path: one(path, leaf) for path, leaf in tree.flatten(params).items()})


def _whole_specs(parameters: Parameters) -> dict[str, P]:
    return {path: axes.gathered_spec(p.axes) for path, p in parameters.items()}


def _resharded(values: Params, specs: Mapping[str, P]) -> Params:
    return tree.unflatten({path: jax.reshard(leaf, specs[path]) for path, leaf in tree.flatten(values).items()})
