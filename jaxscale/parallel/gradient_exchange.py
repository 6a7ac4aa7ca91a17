"""Gradients across slices: each slice computes its own share, one exchange a step adds them up, compressed or not.

What crosses the slow links is a slice's shard: reduce-scatters over `fsdp` have happened before, inside the slice. All
slices decode the same messages in the same order, so they get the same bits. Stochastic rounding and random places
come from (root key, step, path, slice) and the place of a number in its weight, never from a device. Read next:
`compress.py`, `power_sgd.py`; then `train/step.py`, which calls this.

Shapes: N numbers of one device's part of a weight, S slices, L layers, K numbers sent of each layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import axes, rng, tree
from jaxscale.config import Config
from jaxscale.config_error import require
from jaxscale.optim.groups import is_weight, stack_dims
from jaxscale.parallel import power_sgd
from jaxscale.parallel.across_config import AcrossConfig
from jaxscale.parallel.compress import BFloat16, Codec, Quantised, drawn, largest, padded, rounding_noise
from jaxscale.parallel.slices import DATA, EVERYWHERE, OWN, as_own, on_each_slice, own, slices, total
from jaxscale.parallel.zero import differentiable
from jaxscale.task import Batch, Parameter, Params, Task
from jaxscale.train.accumulate import Sums, loss_and_gradients

ACROSS, RESIDUAL, RIGHT = "across", "residual", "right"
"""Entry of the state, and what is in it: each slice's unsent gradients, (slices, ...) with the slices over `data`; and
PowerSGD's Q, equal on all slices."""

State = dict[str, Any]


def check_slices(config: Config, slices: int, weights: int, *, fresh: bool, tables: bool = False) -> None:
    """Raises ConfigError for what so many slices cannot do, with a model of so many parameter arrays.

    `fresh`: the run starts, no checkpoint says how it went on.
    """
    require(
        not tables or (config.across.gradients == "direct" and not config.local.every),
        "a model with embedding tables sends its bags' gradients to the rows they came from, on all slices; set "
        "across.gradients to direct and local.every to 0",
    )
    config.across.check(slices, config.train.noise_scale, config.pipeline.chunks, fresh=fresh)
    config.local.check(
        slices,
        weights,
        {
            "across.gradients": (config.across.gradients, "direct"),
            "optim.name": (config.optim.name, "adamw") if config.optim.name == "muon" else ("", ""),
            "train.noise-scale": (config.train.noise_scale, False),
            "run.layer-stats-every": (config.run.layer_stats_every, 0),
            "pipeline.chunks": (config.pipeline.chunks, 1),
        },
        fresh=fresh,
    )


def init_across(across: AcrossConfig, task: Task, key: jax.Array) -> State:
    """What the state has of the exchange before step 0: nothing where nothing is remembered. Traceable."""
    if not across.keeps_residual:
        return {}
    weights = {path: p for path, p in task.parameters.items() if _is_compressed(across, p)}
    residual = {
        path: jnp.zeros((slices(), *p.shape), jnp.float32, out_sharding=jax.P(DATA, *axes.spec(*p.axes)))
        for path, p in weights.items()
    }
    kept: State = {RESIDUAL: tree.unflatten(residual)}
    if across.gradients == "power-sgd":
        first = {path: power_sgd.init_right(p, across.rank, rng.named_key(key, path)) for path, p in weights.items()}
        kept[RIGHT] = tree.unflatten(first)
    return {ACROSS: kept}


def reduced_gradients(
    config: Config, task: Task, state: State, batch: Batch, key: jax.Array, step: jax.Array, bags: Batch
) -> tuple[Sums, Params, State]:
    """(metrics, gradients of the mean loss, what the state has of the exchange next): see `loss_and_gradients`.

    bags: what was looked up in tables, with `direct` alone. The last result is `{}` where nothing is remembered. A
    gradient that is not finite on one slice is NaN on all.
    """
    compute = partial(loss_and_gradients, task, microbatches=config.train.microbatches, noise=config.train.noise_scale)
    if config.across.gradients == "direct":
        params: Params = state["params"]
        if config.state.zero == 2 or "params" in config.state.offload:
            compute = partial(compute, kept=params)
            params = differentiable(task.parameters, params)
        return *compute(params=params, batch=batch, key=key, bags=bags), {}

    def body(params: Params, batch: Batch, key: jax.Array, step: jax.Array, kept: State) -> tuple[Sums, Params, State]:
        metrics, gradients = compute(params=params, batch=batch, key=key)
        mine = {RESIDUAL: own(kept[RESIDUAL]), RIGHT: kept[RIGHT]}
        send = partial(exchange, config.across, task.parameters, key=rng.named_key(key, ACROSS))
        if config.across.keeps_residual and config.across.warmup:
            summed, mine = jax.lax.cond(step < config.across.warmup, _send_whole, send, gradients, mine)
        else:
            summed, mine = send(gradients, mine)
        return metrics, summed, {RESIDUAL: as_own(mine[RESIDUAL]), RIGHT: mine[RIGHT]}

    kept = {RESIDUAL: {}, RIGHT: {}, **state.get(ACROSS, {})}
    places = {RESIDUAL: OWN, RIGHT: EVERYWHERE}
    region = on_each_slice(body, (EVERYWHERE, OWN, EVERYWHERE, EVERYWHERE, places), (EVERYWHERE, EVERYWHERE, places))
    metrics, gradients, kept = region(state["params"], dict(batch), key, step, kept)
    left = {name: value for name, value in kept.items() if value}
    return metrics, gradients, {ACROSS: left} if left else {}


def exchange(
    across: AcrossConfig, parameters: dict[str, Parameter], gradients: Params, kept: State, key: jax.Array
) -> tuple[Params, State]:
    """The sum of all slices' gradients, float32, and what this slice keeps for the next step. Inside `on_each_slice`.

    gradients: of one slice, sharded as the parameters. kept: residuals and Q of this slice. Weights of one dim (norm
    scales) go in float32: they are few.
    """
    residual, right = tree.flatten(kept[RESIDUAL]), tree.flatten(kept[RIGHT])
    leaves = {path: g.astype(jnp.float32) for path, g in tree.flatten(gradients).items()}
    broken = total(sum(jnp.sum(~jnp.isfinite(g)) for g in leaves.values()))
    summed: dict[str, jax.Array] = {}
    for path, g in leaves.items():
        parameter = parameters[path]
        own_key = rng.named_key(key, path)
        if not _is_compressed(across, parameter):
            summed[path] = total(g)
            continue
        if across.gradients in ("bfloat16", "int8"):
            codec = BFloat16() if across.gradients == "bfloat16" else Quantised(8, across.block)
            summed[path] = sum_encoded(codec, g, own_key)
            continue
        wanted = g + residual[path]
        if slices() == 1:  # the only one that is left: nothing crosses a link
            summed[path], residual[path] = wanted, jnp.zeros_like(wanted)
        elif across.gradients == "power-sgd":
            summed[path], sent, right[path] = power_sgd.approximate(parameter, wanted, right[path])
            residual[path] = wanted - sent
        else:
            summed[path], residual[path] = _sum_of_some(across, parameter, wanted, own_key)
    poison = jnp.where(broken > 0, jnp.nan, 0.0)
    whole = tree.unflatten({path: g + poison for path, g in summed.items()})
    return whole, {RESIDUAL: tree.unflatten(residual), RIGHT: tree.unflatten(right)}


def _send_whole(gradients: Params, kept: State) -> tuple[Params, State]:
    """The same without any compression: nothing is left over. (Residuals are zero before the first compressed step.)"""
    return jax.tree.map(lambda g: total(g.astype(jnp.float32)), gradients), kept


def sum_encoded(codec: Codec, x: jax.Array, key: jax.Array) -> jax.Array:
    """The sum over slices of what each encodes of `x`, float32 of any sharding inside a slice. Inside `on_each_slice`.

    Two slices send each other all they have. More of them first send each one its part to add up, and the sums are
    encoded again: 2 (S - 1) / S of a message from each, as a ring sends, at the price of a second rounding.
    """
    if slices() == 1:
        return x
    spec = jax.typeof(x).sharding.spec
    noises = [rounding_noise(jax.random.fold_in(key, jax.lax.axis_index(DATA)), x.shape, spec)]
    if slices() > 2:
        noises.append(rounding_noise(jax.random.fold_in(key, slices()), x.shape, spec))

    def local(x: jax.Array, *noises: jax.Array) -> jax.Array:
        flat_N = x.reshape(-1)
        send = _exchange_all if slices() <= 2 else _exchange_parts
        return send(codec, flat_N, *(noise.reshape(-1) for noise in noises))[: flat_N.shape[0]].reshape(x.shape)

    specs = (spec,) * (1 + len(noises))
    region = jax.shard_map(local, in_specs=specs, out_specs=spec, axis_names=axes.automatic(), check_vma=False)
    return region(x, *noises)


def _exchange_all(codec: Codec, x_N: jax.Array, noise_N: jax.Array) -> jax.Array:
    message = codec.encode(padded(x_N, codec.multiple), padded(noise_N, codec.multiple))
    return _sum_decoded(codec, jax.lax.all_gather(message, DATA))


def _exchange_parts(codec: Codec, x_N: jax.Array, noise_N: jax.Array, again_N: jax.Array) -> jax.Array:
    count = slices()
    x_SN, noise_SN, again_SN = (padded(v, count * codec.multiple).reshape(count, -1) for v in (x_N, noise_N, again_N))
    sent = jax.lax.all_to_all(jax.vmap(codec.encode)(x_SN, noise_SN), DATA, 0, 0)
    part = _sum_decoded(codec, sent)
    message = codec.encode(part, again_SN[jax.lax.axis_index(DATA)])
    return jax.vmap(codec.decode)(jax.lax.all_gather(message, DATA)).reshape(-1)


def _sum_decoded(codec: Codec, messages: jax.Array) -> jax.Array:
    """Of one message from each slice, in the order of the slices."""
    return sum((codec.decode(message) for message in messages[1:]), start=codec.decode(messages[0]))


def _sum_of_some(
    across: AcrossConfig, parameter: Parameter, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(sum over slices of the numbers that were sent, this slice's others)."""
    spec = jax.typeof(x).sharding.spec

    def local(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_LN = x.reshape(x.shape[0] if stack_dims(parameter) else 1, -1)
        send = _send_largest if across.gradients == "top-k" else _send_drawn
        summed, left = send(x_LN, across.share, key)
        return summed.reshape(x.shape), left.reshape(x.shape)

    region = jax.shard_map(
        local, in_specs=(spec, EVERYWHERE), out_specs=(spec, spec), axis_names=axes.automatic(), check_vma=False
    )
    return region(x, key)


def _send_largest(x_LN: jax.Array, share: float, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    places_LK = largest(x_LN, share)
    values_LK = jnp.take_along_axis(x_LN, places_LK, axis=1)
    message = jnp.stack([jax.lax.bitcast_convert_type(values_LK, jnp.int32), places_LK])
    rows_L1 = jnp.arange(x_LN.shape[0])[:, None]
    summed = jnp.zeros_like(x_LN)
    # One slice after the other: places of one are all different, and floats are added in the same order everywhere.
    for bits_LK, there_LK in jax.lax.all_gather(message, DATA):
        values = jax.lax.bitcast_convert_type(bits_LK, jnp.float32)
        summed = summed.at[rows_L1, there_LK].add(values, unique_indices=True)
    return summed, x_LN.at[rows_L1, places_LK].set(0, unique_indices=True)


def _send_drawn(x_LN: jax.Array, share: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    places_K = drawn(key, x_LN.shape[1], share)
    values_LK = x_LN.at[:, places_K].get(mode="fill", fill_value=0)
    summed = jnp.zeros_like(x_LN).at[:, places_K].set(jax.lax.psum(values_LK, DATA), mode="drop")
    return summed, x_LN.at[:, places_K].set(0, mode="drop")


def _is_compressed(across: AcrossConfig, parameter: Parameter) -> bool:
    if across.gradients == "float32" or not is_weight(parameter):
        return False
    return across.gradients != "power-sgd" or power_sgd.pays(parameter, across.rank)
