"""ZeRO: what the devices of `fsdp` share, each having a shard of it, as a choice between two specs of every weight.

    state.zero   weights   gradients   optimizer's state, moving average     what crosses `fsdp` in a step
    1            whole     whole       shards                                gradients summed, new weights gathered
    2            whole     shards      shards                                gradients scattered, new weights gathered
    3            shards    shards      shards                                weights gathered twice, gradients scattered

(Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.) A shard
has `axes.spec` of the weight's logical axes; whole is `axes.gathered_spec`, the same without `fsdp`. Whoever multiplies
reads from a weight's type how it is stored. At level 2 a weight and its gradient have different types, which autodiff
does not know: the loss then gets both forms of each weight, a `Held`, and is differentiated by the shard. So it is
where weights are kept on the host. Read next: `layers/linear.py`, `train/step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import axes, tree
from jaxscale.host_memory import is_on_host, to_device, to_host
from jaxscale.task import Parameter, Params

Parameters = Mapping[str, Parameter]


class Held(NamedTuple):
    """A weight that is kept in another form than its gradient is wanted in: whole, or in the host's memory."""

    kept: jax.Array
    """What is multiplied; nothing is differentiated by it."""
    shard: jax.Array
    """Device memory's, with the gradient's spec. Layers never read it; embedding and head do, where `kept` is whole."""


Weight = jax.Array | Held


def as_shards(parameters: Parameters, values: Params) -> Params:
    """Weights or gradients -> the shards that the optimizer works on. From whole ones every device cuts its own."""
    return _resharded(values, {path: axes.spec(*p.axes) for path, p in parameters.items()})


def as_stored(level: int, parameters: Parameters, shards: Params) -> Params:
    """Shards of weights -> weights as the state has them; below level 3 they are gathered, in their own dtype."""
    return shards if level == 3 else _resharded(shards, _whole_specs(parameters))


def differentiable(parameters: Parameters, kept: Params) -> Params:
    """What a loss of `held` weights is differentiated by: shards in the devices' memory.

    Of weights on the host they are zeros that nobody reads, and no program makes.
    """

    def one(path: str, leaf: jax.Array) -> jax.Array:
        spec = axes.spec(*parameters[path].axes)
        return jnp.zeros(leaf.shape, leaf.dtype, out_sharding=spec) if is_on_host(leaf) else jax.reshard(leaf, spec)

    return tree.unflatten({path: one(path, leaf) for path, leaf in tree.flatten(kept).items()})


def held(kept: Params, shards: Params) -> Params:
    """Both forms of each weight that has two, for a loss that is differentiated by `shards`."""

    def pair(kept: jax.Array, shard: jax.Array) -> Weight:
        same = jax.typeof(kept).sharding.spec == jax.typeof(shard).sharding.spec and not is_on_host(kept)
        return shard if same else Held(jax.lax.stop_gradient(kept), shard)

    return jax.tree.map(pair, kept, shards)


def at_use(weight: Weight, names: tuple[str | None, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """The whole weight in `dtype`, fetched from the host and gathered where it is there and in shards.

    names: its logical axes.
    """
    kept = to_device(weight.kept if isinstance(weight, Held) else weight)
    return jax.reshard(kept.astype(dtype), axes.gathered_spec(names))


def shard_of(weight: Weight) -> jax.Array:
    """What the gradient is taken by: for those who work on shards anyway."""
    return weight.shard if isinstance(weight, Held) else weight


def for_backward(weight: Weight) -> Weight:
    """What a gradient rule keeps of a weight: not the shard, which it never reads."""
    return Held(weight.kept, None) if isinstance(weight, Held) else weight  # type: ignore[arg-type]


def gradient_spec(weight: Weight, names: tuple[str | None, ...]) -> P:
    """The spec in which the gradient of a weight is wanted. names: its logical axes."""
    return axes.spec(*names) if isinstance(weight, Held) else P(*jax.typeof(weight).sharding.spec)


def gradient_of(weight: Weight, gradient: jax.Array) -> Any:
    """The result of a gradient rule for such an argument, in the weight's dtype."""
    if isinstance(weight, Held):
        return Held(None, gradient.astype(weight.kept.dtype))  # type: ignore[arg-type]  # None: no gradient
    gradient = gradient.astype(weight.dtype)
    return to_host(gradient) if is_on_host(weight) else gradient


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
