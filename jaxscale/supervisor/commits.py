"""When a memory checkpoint exists: every worker sealed its part of the step, and each part has its copies. Pure.

Workers snapshot the same steps; each reports a step as sealed or skipped, then as copied to its peers or not. A step is
*committed* when all of that is there, *dropped* when it cannot be any more. Both decide it, and only then may its slots
be written again (`checkpoint/memory.py` has the workers' side of this promise). Read next: `machine.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

SEALED_SECONDS = 1.0


@dataclass
class _Step:
    sealed: set[str] = field(default_factory=set)
    copies: dict[str, set[str]] = field(default_factory=dict)
    is_dropped: bool = False
    size: int = 0
    seconds: float = 0.0
    blocked_seconds: float = 0.0


class MemoryCommits:
    """Counts the reports of one epoch."""

    def __init__(self, members: Collection[str], replicas: int, committed: int = -1) -> None:
        """`replicas`: copies at other hosts that each part needs. `committed`: the step that the epoch started from."""
        self._members, self._replicas = frozenset(members), replicas
        self._steps: dict[int, _Step] = {}
        self.committed = committed
        """The newest committed step; -1 = none."""
        self.decided = committed
        """Every step up to this one is decided."""
        self.newest: dict[str, Any] = {}
        """Of the newest step committed in this epoch: `step`, `bytes` over all hosts, `seconds` and `blocked_seconds`
        of the slowest."""
        self._told_step, self._told_at = -1, float("-inf")

    def sealed(self, host: str, step: int, size: int = 0, seconds: float = 0.0, blocked: float = 0.0) -> bool:
        """A worker sealed its slot of `size` bytes. Whether the verdict changed; likewise below."""
        self._drop_unreported(host, step)
        found = self._step(step)
        found.sealed.add(host)
        found.size += size
        found.seconds, found.blocked_seconds = max(found.seconds, seconds), max(found.blocked_seconds, blocked)
        return self._judge()

    def news(self, now: float) -> dict[str, Any] | None:
        """What `newest` says, if it is new and none was told for SEALED_SECONDS: an event for each would be a flood."""
        if not self.newest or self.newest["step"] == self._told_step or now - self._told_at < SEALED_SECONDS:
            return None
        self._told_step, self._told_at = self.newest["step"], now
        return self.newest

    def skipped(self, host: str, step: int) -> bool:
        """A worker had no slot to write to."""
        self._drop_unreported(host, step)
        self._step(step).is_dropped = True
        return self._judge()

    def copied(self, host: str, step: int, holder: str) -> bool:
        """`holder` has a verified copy of `host`'s slot."""
        for earlier, found in self._steps.items():
            if earlier < step and holder not in found.copies.get(host, ()):
                found.is_dropped = True
        self._step(step).copies.setdefault(host, set()).add(holder)
        return self._judge()

    def uncopied(self, host: str, step: int) -> bool:
        """A copy will not come to be: the peer is gone, or the slot was written again before it was through."""
        del host
        self._step(step).is_dropped = True
        return self._judge()

    def _drop_unreported(self, host: str, step: int) -> None:
        """Reports come in the order of steps: one that is missing now was lost with a connection and never comes."""
        for earlier, found in self._steps.items():
            if earlier < step and host not in found.sealed:
                found.is_dropped = True

    def _step(self, step: int) -> _Step:
        # What comes late for a decided step changes nothing.
        return self._steps.setdefault(step, _Step()) if step > self.decided else _Step()

    def _judge(self) -> bool:
        before = (self.committed, self.decided)
        complete = [step for step, found in self._steps.items() if self._is_complete(found)]
        if complete:
            # A later complete step decides the earlier ones: nobody will ever want them.
            self.committed = self.decided = max(complete)
            last = self._steps[self.committed]
            self.newest = {
                "step": self.committed,
                "bytes": last.size,
                "seconds": last.seconds,
                "blocked_seconds": last.blocked_seconds,
            }
        for step in sorted(self._steps):
            if step > self.decided and not self._steps[step].is_dropped:
                break
            self.decided = max(self.decided, step)
        self._steps = {step: found for step, found in self._steps.items() if step > self.decided}
        return (self.committed, self.decided) != before

    def _is_complete(self, step: _Step) -> bool:
        if step.is_dropped or not step.sealed >= self._members:
            return False
        return all(len(step.copies.get(host, ())) >= self._replicas for host in self._members)
