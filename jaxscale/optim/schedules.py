"""Learning-rate schedules: pure functions from the step to a share of the peak learning rate.

Steps here are 0-based: step i is the update done after i others. Past the end of a schedule the rate stays at its final
value, so that a run continued with more `--steps` is defined either way. Read next: `build.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxscale.config import OptimConfig

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(optim: OptimConfig, steps: int) -> Schedule:
    """Share of the peak learning rate at a step, for a run of `steps` updates.

    The returned function takes an int32 scalar (traced or not) and gives a float32 scalar in [0, 1]:
    - warmup, all schedules: (i + 1) / (warmup + 1), so that no update is wasted on rate 0 and step `warmup` has
      the peak;
    - `constant`: 1;
    - `cosine` (Loshchilov and Hutter 2017): half a cosine from 1 at step `warmup` to `final` at step `steps`;
    - `wsd` (warmup, stable, decay; Hu et al. 2024): 1 until the last `decay` share of the steps, then a line to `final`
      at step `steps`.
    """
    begin, end = _decay_span(optim, steps)

    def share(step: jax.typing.ArrayLike) -> jax.Array:
        i = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((i + 1) / (optim.warmup + 1), 1.0)
        if optim.schedule == "constant":
            return warm
        progress = jnp.clip((i - begin) / (end - begin), 0.0, 1.0)
        left = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if optim.schedule == "cosine" else 1 - progress
        return warm * (optim.final + (1 - optim.final) * left)

    return share


def describe(
    optim: OptimConfig, steps: int, previous_steps: int | None = None, previous: OptimConfig | None = None
) -> str:
    """One sentence on the schedule, or on what changes when a run of `previous_steps` goes on to `steps`.

    `previous`: the settings until now, where they were others; the rates are compared at the step the run had ended at.
    """
    old = previous or optim
    if previous_steps is None or (previous_steps == steps and old == optim):
        return _shape(optim, steps)
    before, after = _at(old, previous_steps, previous_steps), _at(optim, steps, previous_steps)
    if f"{before:.1e}" == f"{after:.1e}":
        change = f"stays at {after:.1e}"
    else:
        change = f"{'rises' if after > before else 'falls'} from {before:.1e} to {after:.1e}"
    if optim.schedule != old.schedule:
        subject = f"{optim.schedule} over {steps} steps instead of {old.schedule} over {previous_steps}"
    elif optim.schedule == "constant":
        return f"constant: {previous_steps} steps become {steps}, the learning rate {change}"
    elif optim.schedule == "cosine":
        subject = f"cosine decays over {steps} steps instead of {previous_steps}"
    else:
        begins = [_decay_span(*run)[0] for run in ((optim, steps), (old, previous_steps))]
        subject = f"wsd decays over steps {begins[0]}-{steps} instead of {begins[1]}-{previous_steps}"
    return f"{subject}: the learning rate at step {previous_steps} {change}"


def _decay_span(optim: OptimConfig, steps: int) -> tuple[int, int]:
    """First and last step of the decay; at least one step long, and never inside the warmup."""
    length = steps if optim.schedule == "cosine" else max(1, round(optim.decay * steps))
    begin = max(optim.warmup, steps - length)
    return begin, max(steps, begin + 1)


def _at(optim: OptimConfig, steps: int, step: int) -> float:
    """`make_schedule` in plain floats, so that a sentence for the terminal needs no device. Tested to be the same."""
    begin, end = _decay_span(optim, steps)
    warm = min((step + 1) / (optim.warmup + 1), 1.0)
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    decayed = 1.0 if optim.schedule == "constant" else optim.final + (1 - optim.final) * left
    return optim.learning_rate * warm * decayed


def _shape(optim: OptimConfig, steps: int) -> str:
    warmup = f"warmup over {optim.warmup} steps, then " if optim.warmup else ""
    peak, final = f"{optim.learning_rate:.1e}", f"{optim.learning_rate * optim.final:.1e}"
    begin, _ = _decay_span(optim, steps)
    if optim.schedule == "constant":
        return f"constant: {warmup}{peak} for all of {steps} steps"
    if optim.schedule == "cosine":
        return f"cosine: {warmup}from {peak} to {final} at step {steps}"
    return f"wsd: {warmup}{peak} until step {begin}, then a line to {final} at step {steps}"
