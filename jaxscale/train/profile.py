"""Traces a range of steps for xprof (`run.profile`): FIRST:LAST, or some early ones. Read next: `train/loop.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax

from jaxscale.config import EARLY

FIRST, STEPS = 10, 4
"""Which step of a process `early` begins with, after the compilation and the first slow ones, and how many it takes."""


def steps_to_trace(profile: str, start: int, steps: int) -> tuple[int, int] | None:
    """`10:13` -> (10, 13), numbered from 1 as in metrics.jsonl, both ends included; None where nothing is traced.

    start: updates done before this process trains; steps: those of the run. `early` lies inside what this process does.
    """
    if profile == EARLY:
        last = min(start + FIRST + STEPS - 1, steps)
        first = max(start + 1, min(start + FIRST, last - STEPS + 1))
    else:
        first, last = map(int, profile.split(":")) if profile else (1, 0)
    return (first, last) if last > start and first <= last else None


def note(profile: str, start: int, steps: int) -> str:
    """A line for people where a trace is asked for that cannot be made; else empty."""
    if not profile or start >= steps or steps_to_trace(profile, start, steps):
        return ""
    return (
        f"run.profile {profile} lies before step {start + 1:,}, where this start goes on: nothing is traced; use later "
        "steps, or --profile for the first ones of this start"
    )


class Profiler:
    """Starts and stops the trace around its steps; a run that ends early still writes what was traced.

    `wait`: returns when the devices have done all that was dispatched, so that the trace holds whole steps.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, wait: Callable[[], object]) -> None:
        self._range, self._wait = steps, wait
        self._folder = directory / "profile"
        self._tracing = False

    def before(self, step: int) -> None:
        """Called before each step with the updates done so far."""
        if self._range is None:
            return
        first, last = self._range
        if self._tracing and step >= last:
            self._wait()
            self._stop()
        elif not self._tracing and first - 1 <= step < last:
            self._wait()
            if jax.process_count() > 1:  # JAX names the file by the host, which processes may share
                self._folder /= f"process-{jax.process_index()}"
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracing:
            if error is None:
                self._wait()
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        self._range = None
