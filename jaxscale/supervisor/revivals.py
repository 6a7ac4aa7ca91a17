"""When a process that died is started again, and when no more: later and later while the run gets no further. Pure.

What somebody kills comes back at once. What ends by its own fault, or dies again before a new step is trained, waits
longer each time, and is given up after `RESTARTS` times; a new step pays for all of them, so that a run of weeks does
not end by faults that it survived. Read next: `launch.py`.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from jaxscale.retry import RetryConfig, pause

RESTARTS = 20
"""How often one process is started again without a new step in between."""
RESTART_RETRY = RetryConfig(first_seconds=0.5)
"""Waits before a start."""
WELL_SECONDS = 10.0
"""One that ran so long had not failed at its start."""
_OWN = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


@dataclass
class _Life:
    began: float = 0.0
    step: int = 0
    """The highest that the run had reached then."""
    restarts: int = 0
    failures: int = 0
    """Ends by its own fault, one after the other."""


class Revivals:
    """Counts by name. Every method takes the time and the highest step that the run has reached."""

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}

    def began(self, name: str, now: float, step: int) -> None:
        """It was started."""
        life = self._lives.setdefault(name, _Life())
        life.began, life.step = now, step

    def ended(self, name: str, code: int, now: float, step: int) -> float | None:
        """It ended with this exit code (below 0: by that signal). Seconds until it is to be started; None: never."""
        life = self._lives.setdefault(name, _Life())
        if step > life.step:
            life.restarts = 0
        if now - life.began >= WELL_SECONDS:
            life.failures = 0
        if life.restarts >= RESTARTS:
            return None
        life.restarts += 1
        life.failures += code >= 0 or -code in _OWN
        times = max(life.restarts - 1, life.failures)
        return pause(RESTART_RETRY, times, 0.0) if times else 0.0
