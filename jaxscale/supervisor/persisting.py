"""Which committed memory checkpoint becomes a durable one, and how far that is. Pure; one for each epoch.

The coordinator makes room for the step, every host writes its part from its memory slot, the coordinator makes a step
of the parts. Training takes no part in it: its workers only leave the slot alone meanwhile. What fails is tried again
with a newer step. Read next: `machine.py`, which tells agents and coordinator; `../checkpoint/persist.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from jaxscale.checkpoint.interval import AUTO
from jaxscale.retry import RetryConfig, pause
from jaxscale.supervisor.durable_pace import DurablePace

Phase = Literal["idle", "room", "copy", "finalise"]

LIMIT_SECONDS = 1200.0
"""For one phase; storage that hangs longer costs the attempt."""


@dataclass
class Persisting:
    """From commit to commit."""

    members: Collection[str]
    every: int | Literal["auto"]
    """Steps between durable checkpoints; 0 = none are made this way; auto: `pace` says when."""
    done: int
    """The newest durable step that this epoch's history has."""
    pace: DurablePace = field(default_factory=lambda: DurablePace(0.0))
    """Of the run, across its epochs."""
    step: int = -1
    """Under way; -1 = none is."""
    phase: Phase = "idle"
    began: float = 0.0
    entered: float = 0.0
    failures: int = 0
    _written: set[str] = field(default_factory=set)
    _not_before: float = 0.0

    @property
    def keep(self) -> int:
        """The step that is being made durable, whose slots must not be written over; -1 = none."""
        return self.step

    def begins(self, committed: int, now: float) -> bool:
        """Whether the newest committed step is to be made durable, from now on."""
        if self.phase != "idle" or now < self._not_before or not self._is_due(committed, now):
            return False
        self.step, self.phase, self.began, self.entered, self._written = committed, "room", now, now, set()
        return True

    def _is_due(self, committed: int, now: float) -> bool:
        if self.every == AUTO:
            return committed > self.done and self.pace.is_due(now)
        return self.every > 0 and committed // self.every > self.done // self.every

    def has_room(self, step: int, now: float) -> bool:
        """Whether hosts are to write now."""
        if (self.step, self.phase) != (step, "room"):
            return False
        self.phase, self.entered = "copy", now
        return True

    def written(self, host: str, step: int, now: float) -> bool:
        """A host has written its part. Whether that was the last one."""
        if (self.step, self.phase) != (step, "copy"):
            return False
        self._written.add(host)
        if not self._written >= set(self.members):
            return False
        self.phase, self.entered = "finalise", now
        return True

    def sealed(self, step: int, now: float) -> None:
        """The step exists."""
        self.done = max(self.done, step)
        self.pace.sealed(now - self.began, now)
        if step == self.step:
            self.step, self.phase, self.failures = -1, "idle", 0

    def failed(self, step: int, now: float) -> bool:
        """An attempt came to nothing. Whether it was the one under way; another begins after a pause."""
        if step != self.step or self.phase == "idle":
            return False
        self.failures += 1
        self.step, self.phase = -1, "idle"
        self._not_before = now + pause(RetryConfig(), self.failures, 0.0)
        return True

    def is_stuck(self, now: float) -> bool:
        """Whether a phase lasts too long."""
        return self.phase != "idle" and now - self.entered > LIMIT_SECONDS
