"""How far apart durable checkpoints are where the recipe leaves it open (`checkpoint.every` is `auto`). Pure.

A save costs the time that training waits for it, and slows what runs beside it; a failure that only the durable tier
survives costs, on average, half of what is trained between two saves. The sum is least at T = sqrt(2 C M) seconds
between saves (Young 1974; Daly 2006): C seconds that a save costs, M seconds between failures. Read next: `due.py`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

AUTO: Literal["auto"] = "auto"

LEAST_SECONDS = 300.0
"""No closer than this unless the recipe's bound is smaller: storage is shared, and its requests are paid for."""
WRITING_SHARE = 0.1
"""Of all time, at most, storage is being written to."""
SLOWDOWN = 0.03
"""Of training while a save is written beside it: the most that is taken for granted (`bench/checkpoint.py`)."""
PRIOR_SECONDS = 6 * 3600.0
"""Before anything failed: as if one such failure in six hours had been seen."""
NOTICEABLE = 1.25
"""Another interval is told when it is so many times longer or shorter than the one that was told."""
WINDOW = 9


def young_daly(cost: float, between_failures: float) -> float:
    """Seconds between checkpoints at which what they cost and what failures cost is least in sum. All in seconds."""
    return math.sqrt(2 * cost * between_failures)


@dataclass(frozen=True)
class SaveCosts:
    """What the newest saves of this run have cost. Immutable: each save gives another one."""

    blocked: tuple[float, ...] = ()
    """Seconds that training waited for each."""
    written: tuple[float, ...] = ()
    """Seconds from the beginning of each to the step's existence."""

    def with_save(self, blocked: float, seconds: float) -> SaveCosts:
        """With one more save."""
        both = (*self.blocked, blocked)[-WINDOW:], (*self.written, seconds)[-WINDOW:]
        return replace(self, blocked=both[0], written=both[1])

    def seconds_between(self, at_most: float, trained: float, failures: int = 0) -> float:
        """Seconds from one save to the next.

        at_most: the recipe's bound. trained: seconds since training began, in which `failures` went back to the
        durable tier. Before anything is measured: the shortest there is, so that something is safe early.
        """
        least = min(LEAST_SECONDS, at_most)
        if not self.blocked:
            return least
        written = statistics.median(self.written)
        cost = statistics.median(self.blocked) + SLOWDOWN * written
        best = young_daly(cost, (max(0.0, trained) + PRIOR_SECONDS) / (failures + 1))
        return min(at_most, max(least, best, written / WRITING_SHARE))


def allowed(at_most: float) -> float:
    """Seconds that the newest step may be old, with the recipe's bound: one that is due has to be written first."""
    return 1.2 * at_most + 10


def is_noticeable(seconds: float, told: float) -> bool:
    """Whether people should hear of an interval. told: the last one that they heard of; 0 = none."""
    return max(seconds, told) >= NOTICEABLE * min(seconds, told)
