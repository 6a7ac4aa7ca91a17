"""Looks at a step's loss and gradient inside the program and decides whether the update is applied.

A loss far above the recent ones is skipped as a spike. One that stays there is no spike but a new level (of another
mixture, say) and is accepted: once `PERSISTS` of the last `RECENT` finite losses were spikes. So no more than
`PERSISTS` updates with finite losses are skipped in a row. All of it is a function of the window, which lies in the
state. Read next: `train/step.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

RECENT, PERSISTS = 10, 8
FEWEST = 8
"""Losses that a median is taken of at least."""


def empty_window(size: int) -> jax.Array:
    """Losses of the last `size` finite updates, newest last; NaN where there were none yet. Replicated float32."""
    return jnp.full((size,), jnp.nan, jnp.float32)


def spike_score(window: jax.Array, loss: jax.Array) -> jax.Array:
    """How many robust standard deviations `loss` lies above the median of those before it (0 before 8 are known).

    It looks back on all of the window but the oldest `RECENT`, which serve to judge the newest ones again.
    """
    return _scores(window[-_baseline(window) :][None], loss[None])[0]


def accepts(window: jax.Array, loss: jax.Array, grad_norm: jax.Array, score: jax.Array, limit: float) -> jax.Array:
    """Whether to apply the update: loss and gradient norm are finite, and the loss no spike above `limit` (0 = any).

    Windows shorter than `FEWEST + PERSISTS` hold too little to judge again; there a new level is accepted when it has
    moved the median, after half a window.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    return finite & ((score <= limit) | _persists(window, limit)) if limit else finite


def push(window: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """The window after the update, skipped or not; what is not finite leaves it as it was."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    return jnp.where(finite, jnp.concatenate([window[1:], loss[None]]), window)


def _baseline(window: jax.Array) -> int:
    return max(FEWEST, len(window) - RECENT)


def _persists(window: jax.Array, limit: float) -> jax.Array:
    """Whether `PERSISTS` of the newest losses were spikes, each by exactly the losses that it was judged by then."""
    size, length = len(window), _baseline(window)
    places = range(length, size)
    if len(places) < PERSISTS:
        return jnp.bool_(False)
    before = jnp.stack([window[place - length : place] for place in places])
    return jnp.sum(_scores(before, window[length:]) > limit) >= PERSISTS


def _scores(before: jax.Array, losses: jax.Array) -> jax.Array:
    """Robust z-scores of losses (n,) by those `before` (n, length): 0.6745 (x - median) / MAD.

    Iglewicz and Hoaglin 1993.
    """
    median = jnp.nanmedian(before, axis=1)
    deviation = jnp.nanmedian(jnp.abs(before - median[:, None]), axis=1)
    scores = 0.6745 * (losses - median) / jnp.maximum(deviation, 1e-6)
    return jnp.where(jnp.sum(jnp.isfinite(before), axis=1) >= FEWEST, scores, 0.0)
