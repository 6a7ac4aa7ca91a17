"""From the metrics of a step on the devices to a line of metrics.jsonl.

The loop fetches a step's metrics after it has dispatched the next one, so that devices never wait for the host. Read
next: `track/jsonl.py`, which writes the lines.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxscale.track.lines import NONFINITE
from jaxscale.train.statistics import LAYERS

EVALUATION = "eval_"
"""Prefix of what an evaluation of the held-out documents writes."""

RESERVED = frozenset(
    [
        *("step", "epoch", "row", "rows", "loss", "grad_norm", "learning_rate", "tokens", "examples", "step_seconds"),
        *("pause_seconds", "time"),
        *("skipped", "spike", "noise_scale", "noise_trace", "signal", "part_square", "parts"),
        *("imbalance",),
        *("evaluation_unfinished", NONFINITE),
    ]
)
"""Fields of a line, and what they are computed from: no hook of a recipe may return these names."""


def is_reserved(name: str) -> bool:
    """Whether a field of this name is the run's own, so that nobody else may write it."""
    return name in RESERVED or name.startswith((EVALUATION, LAYERS))


@dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose metrics were not fetched yet."""

    step: int
    """Updates done, this one included."""
    row: int
    rows: int
    metrics: Mapping[str, jax.Array]


class Clock:
    """Seconds per step: from the end of one step to the end of the next, without what lies between them."""

    def __init__(self) -> None:
        self._mark = time.monotonic()
        self._pause = 0.0

    def restart(self) -> None:
        """The time since the last step is none of the next one: it went into a compilation, an evaluation or a save."""
        self._pause += self._since()

    def lap(self) -> tuple[float, float]:
        """Seconds of the step that ends now, and those between the step before and its begin."""
        pause, self._pause = self._pause, 0.0
        return self._since(), pause

    def _since(self) -> float:
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        return seconds


def make_line(
    pending: Pending, epoch: int, clock: Clock, layer_stats_every: int, unit: str = "tokens"
) -> dict[str, Any]:
    """Waits for the step and returns its line. Floats are exact: float32 values written as Python floats.

    unit: what the model calls that which its loss weights count.
    """
    values = jax.device_get(dict(pending.metrics))
    seconds, pause = clock.lap()
    line: dict[str, Any] = {
        "step": pending.step,
        "epoch": epoch,
        "row": pending.row,
        "rows": pending.rows,
        "loss": float(values.pop("loss")),
        "grad_norm": float(values.pop("grad_norm")),
        "learning_rate": float(values.pop("learning_rate")),
        unit: int(values.pop("tokens")),
        "step_seconds": seconds,
        "pause_seconds": pause,
        "time": time.time(),
        "skipped": int(values.pop("skipped")),
    }
    with_layers = layer_stats_every and pending.step % layer_stats_every == 0
    for name, value in sorted(values.items()):
        if not name.startswith(LAYERS):
            line[name] = float(value)
        elif with_layers:
            line[name] = np.asarray(value, np.float64).tolist()
    return line
