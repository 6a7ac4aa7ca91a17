"""How often to save into memory where the recipe leaves it open (`memory.every` is `auto`): from measured cost. Pure.

A checkpoint costs the time that training waits for the copy; a failure costs, on average, half of what is trained
between two of them. The sum is least at T = sqrt(2 C M) seconds between checkpoints (Young, Daly): C seconds of
waiting, M seconds between failures. Read next: `machine.py`, which decides; `../checkpoint/memory.py`, which follows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxscale.checkpoint.interval import young_daly

FIRST_STEPS = 5
"""Steps between checkpoints until there are measurements, which soon there are; and something is safe early."""
PRIOR_SECONDS = 3600.0
"""Before anything failed: as if one failure in an hour had been seen."""
BLOCKED_SHARE = 0.005
"""Of training time: no more is spent waiting for copies, unless LONGEST_SECONDS asks for it."""
LONGEST_SECONDS = 30.0
"""No more than so much is ever trained twice, whatever it costs."""
ENOUGH, WINDOW = 5, 9
"""Checkpoints that must have been measured, and the newest that count: of these the median. The first ones of an epoch
also allocate their memory."""
NOTICEABLE = 1.5
"""A cadence is kept until another is so many times longer or shorter: up to there it costs 8 % more than the best."""
NOTICE_SECONDS = 2.0
"""Between the decision and the step from which it holds: all workers will have read it by then."""


@dataclass(frozen=True)
class Cadence:
    """From a step on, every so many steps. `every` = 0: nothing was decided, and workers go on as they do."""

    since: int = -1
    every: int = 0


UNDECIDED = Cadence()


@dataclass(frozen=True)
class Costs:
    """What checkpoints and failures of this run have cost so far. Immutable: each change gives another one."""

    blocked: tuple[float, ...] = ()
    """Seconds that training waited in the slowest worker for each of the newest checkpoints."""
    newest: int = -1
    """Step of the last of them."""
    failures: int = 0

    def sealed(self, newest: Mapping[str, Any]) -> Costs:
        """With the newest committed checkpoint (`MemoryCommits.newest`), if it is another one."""
        if not newest or newest["step"] == self.newest:
            return self
        return replace(self, blocked=(*self.blocked, newest["blocked_seconds"])[-WINDOW:], newest=newest["step"])

    def failed(self) -> Costs:
        """With one more failure."""
        return replace(self, failures=self.failures + 1)

    def between_failures(self, seconds: float) -> float:
        """Mean seconds between failures, `seconds` after the beginning."""
        return (max(0.0, seconds) + PRIOR_SECONDS) / (self.failures + 1)


def steps_between(blocked: float, step: float, between_failures: float) -> int:
    """Steps from one checkpoint to the next, at least 1.

    blocked: seconds that training waits for a checkpoint. step: seconds of a step.
    """
    seconds = max(young_daly(blocked, between_failures), blocked / BLOCKED_SHARE)
    return max(1, min(math.ceil(seconds / step), int(LONGEST_SECONDS / step)))


@dataclass(frozen=True)
class Choice:
    """A cadence, and what it was made from."""

    cadence: Cadence
    blocked_seconds: float
    step_seconds: float
    failure_seconds: float

    def fields(self) -> dict[str, Any]:
        """Of its event."""
        return {
            "every": self.cadence.every,
            "since": self.cadence.since,
            "blocked_seconds": round(self.blocked_seconds, 6),
            "step_seconds": round(self.step_seconds, 6),
            "failure_seconds": round(self.failure_seconds, 1),
        }


def choose(costs: Costs, current: Cadence, steps: Sequence[float], seconds: float, reached: int) -> Choice | None:
    """Another cadence than the current one; None where it stays, or too little is known.

    steps: seconds of the newest steps. seconds: since the beginning. reached: the step that training has come to.
    """
    if len(costs.blocked) < ENOUGH or len(steps) < ENOUGH or reached < current.since:
        return None  # one that no worker follows yet has not been measured
    blocked, step = statistics.median(costs.blocked), statistics.median(steps)
    if step <= 0:
        return None
    between = costs.between_failures(seconds)
    every, before = steps_between(blocked, step, between), current.every
    if every == before or max(every, before) < NOTICEABLE * min(every, before):
        return None
    return Choice(Cadence(reached + notice_steps(steps), every), blocked, step, between)


def notice_steps(steps: Sequence[float]) -> int:
    """Steps until all workers have read what is decided now. steps: seconds of the newest ones."""
    step = statistics.median(steps) if steps else 0.0
    return max(2, math.ceil(NOTICE_SECONDS / step)) if step > 0 else 100
