"""The training step: a pure function of state and batch, the file everybody reads.

It knows no mesh, no host and no model. What a config turns on or off is decided in `make_step`, before tracing.
Read next: `train/accumulate.py` and `parallel/gradient_exchange.py` (gradients), `optim/build.py` (updates),
`train/loop.py` (who calls this).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxscale.config import Config
from jaxscale.host_memory import fetched_after, offload
from jaxscale.optim.build import Optimizer, apply_updates
from jaxscale.optim.clip import clip_by_global_norm, norm_of, sum_of_squares
from jaxscale.optim.ema import update_ema
from jaxscale.parallel.gradient_exchange import reduced_gradients
from jaxscale.parallel.local_sgd import local_step
from jaxscale.parallel.zero import as_shards, as_stored
from jaxscale.task import Batch, Task
from jaxscale.train import guard
from jaxscale.train.state import State
from jaxscale.train.statistics import extra_metrics
from jaxscale.train.tables import TABLES, look_up_tables, update_tables

Metrics = dict[str, jax.Array]
Step = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]


def train_step(
    state: State, batch: Batch, step: jax.Array, *, config: Config, task: Task, optimizer: Optimizer
) -> tuple[State, Metrics]:
    """One update. Returns the new state and float32 metrics (scalars; `layers/...` are (layers, ...)), all replicated.

    state: see `state.py`; batch: arrays (rows, sequence) split over (data, fsdp, expert); step: int32, updates before
    this one. A loss or gradient that is not finite, or a spike, leaves weights and optimizer as they are and counts.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), step)
    bags, counts = look_up_tables(task, state, batch)
    metrics, gradients, across = reduced_gradients(config, task, state, batch, key, step, bags)
    squares = sum_of_squares(gradients, task.parameters)
    norm, score = norm_of(squares), guard.spike_score(state["window"], metrics["loss"])
    accepted = guard.accepts(state["window"], metrics["loss"], norm, score, config.train.skip_spikes_above)

    clipped = clip_by_global_norm(gradients, norm, config.optim.clip)
    tables = update_tables(task, state, batch, clipped.pop(TABLES, {}), accepted, optimizer.share(step))
    moved: State = {name: state[name] for name in ("params", "opt", "ema") if name in state}
    here = fetched_after(norm, moved)
    before = as_shards(task.parameters, here["params"])
    updates, opt = optimizer.update(as_shards(task.parameters, clipped), here["opt"], before, step)
    params = apply_updates(before, updates)
    new = {"params": params, "opt": opt, **across}
    if "ema" in state:
        new["ema"] = update_ema(here["ema"], params, config.optim.ema)

    old: State = {**{name: state[name] for name in across}, **here, "params": before}
    kept = jax.tree.map(partial(jnp.where, accepted), new, old)
    kept["params"] = as_stored(config.state.zero, task.parameters, kept["params"])
    kept = offload(config, task.parameters, kept)
    skipped = state["skipped"] + jnp.where(accepted, 0, 1)
    metrics |= {"grad_norm": norm, "learning_rate": optimizer.learning_rate(step), "spike": score, "skipped": skipped}
    metrics |= counts | extra_metrics(config, task, metrics, squares, before, params)
    window = guard.push(state["window"], metrics["loss"], norm)
    return {**state, **kept, **tables, "window": window, "skipped": skipped}, metrics


def make_step(config: Config, task: Task, optimizer: Optimizer) -> Step:
    """The jitted step. The state is donated: its buffers are reused for the new one."""
    step = local_step if config.local.every else train_step
    return jax.jit(partial(step, config=config, task=task, optimizer=optimizer), donate_argnums=0)
