"""When which fault strikes: a pure function of the seed, so that a run that failed can be had again.

Read next: `run.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Strike:
    """A fault to come."""

    kind: str
    after_steps: int
    """New steps since training went on after the one before."""
    seed: int
    """Of the random numbers that choose whom it hits."""


FIRST_STEPS, LAST_STEPS, BETWEEN_STEPS = 10, 50, 10
"""Before the first fault, after the last, and after each: a fault of no consequence takes some steps as well."""
LEAVE_STEPS = 40
"""More of them after a host was told to end, or is cut off: training goes on meanwhile."""
LEAVING = ("preempt", "cut", "pause")


def steps_for(strikes: Sequence[Strike]) -> int:
    """Steps of a run that is long enough for these faults."""
    between = sum(s.after_steps + BETWEEN_STEPS + (LEAVE_STEPS if s.kind in LEAVING else 0) for s in strikes)
    return FIRST_STEPS + between + LAST_STEPS


def schedule(seed: int, faults: int, kinds: Sequence[str], least: int, most: int) -> tuple[Strike, ...]:
    """`faults` strikes of these kinds, `least` to `most` new steps apart. Every kind comes before one comes again."""
    draw = random.Random(seed)
    strikes: list[Strike] = []
    left: list[str] = []
    for _ in range(faults):
        if not left:
            left = draw.sample(list(kinds), len(kinds))
        strikes.append(Strike(left.pop(), draw.randint(least, most), draw.randrange(1 << 30)))
    return tuple(strikes)
