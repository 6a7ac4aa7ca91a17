"""DiLoCo: each slice trains weights of its own for some steps, then all take one common step from where they got to.

Inner steps are the run's own optimizer on the slice's rows alone; nothing crosses slices but a few scalars. Every
`local.every` steps the mean of how far the slices have moved is the gradient of an outer step with Nesterov momentum
(Douillard et al. 2023, "DiLoCo"). In fragments (Douillard et al. 2025, "Streaming DiLoCo") parts of the model are
exchanged at different steps, so that the link is never asked for all at once, and a result may be put in some steps
later. The state is

    params        common weights, equal on all slices: what is evaluated, saved for others, and taken by who joins
    opt/outer     momentum of the outer step      opt/pending   means that were exchanged and not put in yet (delay)
    local/params  each slice's weights            local/opt     and its optimizer's state, both (slices, ...)

with the slices of `local` over the mesh axis `data`: each is on its slice alone, in memory as in checkpoints, which so
hold it once. Read next: `gradient_exchange.py`, whose codecs are used here, and `../checkpoint/by_slice.py`, for slices
that leave and join.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import rng, tree
from jaxscale.config import Config
from jaxscale.optim.build import Optimizer, apply_updates
from jaxscale.optim.clip import clip_by_global_norm, norm_of, sum_of_squares
from jaxscale.optim.ema import update_ema
from jaxscale.parallel.compress import BFloat16, Codec, Quantised
from jaxscale.parallel.fragments import fragments, is_due
from jaxscale.parallel.gradient_exchange import sum_encoded
from jaxscale.parallel.local_config import LocalConfig
from jaxscale.parallel.slices import DATA, EVERYWHERE, OWN, as_own, on_each_slice, own, slices, total
from jaxscale.task import Batch, Params, Task
from jaxscale.train import guard
from jaxscale.train.accumulate import Sums, loss_and_gradients

LOCAL, OUTER, PENDING = "local", "outer", "pending"
State = dict[str, Any]


def init_local(config: Config, optimizer: Optimizer, params: Params) -> State:
    """The entries `opt` and `local` of the state before step 0: every slice starts from the common weights."""

    def spread(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (slices(), *x.shape), out_sharding=jax.P(DATA, *jax.typeof(x).sharding.spec))

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    opt = {OUTER: zeros, **({PENDING: zeros} if config.local.delay else {})}
    inner = {"params": params, "opt": optimizer.init(params)}
    return {"opt": opt, LOCAL: jax.tree.map(spread, {name: value for name, value in inner.items() if value})}


def local_step(
    state: State, batch: Batch, step: jax.Array, *, config: Config, task: Task, optimizer: Optimizer
) -> tuple[State, Sums]:
    """One inner step of every slice, and the outer step of the fragments that are due: as `train_step` for the loop.

    `loss` is the mean over all tokens, of each slice's under its own weights; `grad_norm` the root mean square of the
    slices' norms. A step that is not accepted is none on any slice; exchanges go on.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), step)
    body = partial(_on_slice, config, task, optimizer)
    region = on_each_slice(
        body, (EVERYWHERE, OWN, OWN, EVERYWHERE, EVERYWHERE, EVERYWHERE), (EVERYWHERE, OWN, EVERYWHERE)
    )
    common = {"params": state["params"], "opt": state["opt"]}
    common, local, metrics = region(common, state[LOCAL], dict(batch), key, step, state["window"])
    skipped = state["skipped"] + jnp.where(metrics.pop("accepted"), 0, 1)
    new = {**state, **common, LOCAL: local, "skipped": skipped}
    if "ema" in state:
        new["ema"] = update_ema(state["ema"], common["params"], config.optim.ema)
    new["window"] = guard.push(state["window"], metrics["loss"], metrics["grad_norm"])
    return new, {**metrics, "learning_rate": optimizer.learning_rate(step), "skipped": skipped}


def _on_slice(
    config: Config,
    task: Task,
    optimizer: Optimizer,
    common: State,
    local: State,
    batch: Batch,
    key: jax.Array,
    step: jax.Array,
    window: jax.Array,
) -> tuple[State, State, Sums]:
    mine = {"opt": {}, **own(local)}
    metrics, gradients = loss_and_gradients(task, mine["params"], batch, key, config.train.microbatches, noise=False)
    # They are a share of the mean over all slices; a slice's own mean is over its own tokens.
    weight = batch["loss_weight"].sum()
    ratio = jnp.where(weight > 0, metrics["tokens"] / jnp.where(weight > 0, weight, 1), 0)
    gradients = jax.tree.map(lambda g: g * ratio, gradients)
    norm = norm_of(sum_of_squares(gradients))
    metrics["grad_norm"] = jnp.sqrt(total(norm**2) / slices())
    metrics["spike"] = guard.spike_score(window, metrics["loss"])
    limit = config.train.skip_spikes_above
    accepted = guard.accepts(window, metrics["loss"], metrics["grad_norm"], metrics["spike"], limit)

    clipped = clip_by_global_norm(gradients, norm, config.optim.clip)
    updates, opt = optimizer.update(clipped, mine["opt"], mine["params"], step)
    moved = {"params": apply_updates(mine["params"], updates), "opt": opt}
    mine = jax.tree.map(partial(jnp.where, accepted), moved, mine)
    common, weights = outer_steps(config.local, task, common, mine["params"], rng.named_key(key, LOCAL), step)
    mine = {name: value for name, value in {**mine, "params": weights}.items() if value}
    return common, as_own(mine), {**metrics, "accepted": accepted}


def outer_steps(
    local: LocalConfig, task: Task, common: State, weights: Params, key: jax.Array, step: jax.Array
) -> tuple[State, Params]:
    """What is due after inner step `step` (0-based): (common weights and outer state, this slice's weights).

    Inside `on_each_slice`. The conditions are the same on all devices, so their collectives meet.
    """
    flat = {"params": tree.flatten(common["params"]), **{k: tree.flatten(v) for k, v in common["opt"].items()}}
    mine = tree.flatten(weights)
    exchange, take = partial(_mean_movement, local, key), partial(_outer_step, local)
    for number, paths in enumerate(fragments(task.parameters, local.fragments)):
        begins = is_due(step + 1, local.every, number, local.fragments)
        part = {name: {path: leaves[path] for path in paths} for name, leaves in flat.items()}
        own_part = {path: mine[path] for path in paths}
        if local.delay:
            ends = is_due(step + 1, local.every, number, local.fragments, local.delay)
            # First what was exchanged some steps ago is put in: the next exchange of these weights begins later.
            part, own_part = jax.lax.cond(
                ends, lambda p, o: take(p, o, p[PENDING]), lambda p, o: (p, o), part, own_part
            )
            part[PENDING] = jax.lax.cond(begins, exchange, lambda p, _: p[PENDING], part, own_part)
        else:
            part, own_part = jax.lax.cond(
                begins, lambda p, o: take(p, o, exchange(p, o)), lambda p, o: (p, o), part, own_part
            )
        for name, leaves in part.items():
            flat[name] |= leaves
        mine |= own_part
    params = tree.unflatten(flat.pop("params"))
    return {"params": params, "opt": {k: tree.unflatten(v) for k, v in flat.items()}}, tree.unflatten(mine)


def _mean_movement(local: LocalConfig, key: jax.Array, common: State, mine: dict[str, jax.Array]) -> dict[str, Any]:
    """Mean over slices of (common weights - this slice's), by path, float32: the outer gradient."""
    found = {}
    for path, weight in mine.items():
        movement = common["params"][path].astype(jnp.float32) - weight.astype(jnp.float32)
        codec = _codec(local)
        summed = total(movement) if codec is None else sum_encoded(codec, movement, rng.named_key(key, path))
        found[path] = summed / slices()
    return found


def _outer_step(
    local: LocalConfig, common: State, mine: dict[str, jax.Array], gradient: dict[str, jax.Array]
) -> tuple[State, dict[str, jax.Array]]:
    """SGD with Nesterov momentum, as PyTorch has it: m = mu m + g; w = w - rate (g + mu m). Then slices take w."""
    new: State = {**common, "params": {}, OUTER: {}}
    taken = {}
    for path, g in gradient.items():
        before = common["params"][path]
        momentum = local.momentum * common[OUTER][path] + g
        wide = before.astype(jnp.float32) - local.learning_rate * (g + local.momentum * momentum)
        new["params"][path], new[OUTER][path] = wide.astype(before.dtype), momentum
        kept = local.mixing * mine[path].astype(jnp.float32) + (1 - local.mixing) * wide if local.mixing else wide
        taken[path] = kept.astype(before.dtype)
    return new, taken


def _codec(local: LocalConfig) -> Codec | None:
    if local.exchange == "float32":
        return None
    return BFloat16() if local.exchange == "bfloat16" else Quantised(4 if local.exchange == "int4" else 8, local.block)
