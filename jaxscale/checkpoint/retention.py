"""Which steps are kept, and why. Pure: facts in, decisions out.

The newest, those of the last days where that is wanted, milestones, the best evaluation, versions, and whatever
somebody reads at this moment. `prune.py` gathers the facts and carries the decisions out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

DAY = 86400.0
KEEP_DAYS = 30.0
"""What `jaxscale checkpoints prune` leaves alone if nothing else is said."""
LEAST = 2
"""Newest steps that are kept whatever room there is: if one turns out damaged, there is another."""


@dataclass(frozen=True)
class Rules:
    """What a run wants kept. Versions, holds and the best evaluation come on top."""

    keep: int = 10
    """Newest steps; at least 1."""
    keep_days: float = 0.0
    """Age up to which every step stays, in days; 0 = none is kept for its age."""
    milestones: int = 0
    """Every step that is a multiple of this is kept for ever; 0 = none."""


@dataclass(frozen=True)
class Step:
    """What is known of a step."""

    step: int
    is_sealed: bool = True
    """Whether it counts: a step that is partial or damaged takes no other one's place."""
    time: float = 0.0
    """When it was sealed, in seconds since 1970."""
    loss: float | None = None
    """Of its evaluation; None where it was not evaluated."""


@dataclass(frozen=True)
class Facts:
    """What is known beside the steps themselves."""

    now: float = 0.0
    versions: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """By step: names of what was tagged."""
    holds: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """By step: who reads it at this moment."""
    refused: Collection[int] = ()
    """Steps that restore could not read."""


def decide(steps: Sequence[Step], rules: Rules, facts: Facts, newest: int | None = None) -> dict[int, tuple[str, ...]]:
    """Why each step stays; it goes where there is no reason.

    `newest`: the step just sealed (None: the newest there is). A step beyond it is of an earlier start and stays until
    training comes by. Steps that are refused or damaged do not count among the newest, or they would push out those
    that can be read; they go once `keep` good ones are newer, a refused one with the next save. Without a good step
    nothing goes at all.
    """
    good = sorted((s for s in steps if s.is_sealed and s.step not in facts.refused), key=lambda s: s.step)
    newest = good[-1].step if newest is None and good else newest
    counted = [s.step for s in good if newest is not None and s.step <= newest][-rules.keep :]
    best = min((s for s in good if s.loss is not None), key=lambda s: (s.loss, s.step), default=None)
    decisions = {}
    for one in steps:
        because = []
        if one.step in counted:
            place = len(counted) - counted.index(one.step)
            because.append("newest" if place == 1 else f"newest {place} of {rules.keep}")
        because += [f"held by {who}" for who in facts.holds.get(one.step, ())]
        because += [f"version {name}" for name in facts.versions.get(one.step, ())]
        if one in good:
            if rules.milestones and one.step and one.step % rules.milestones == 0:
                because.append(f"milestone of {rules.milestones} steps")
            if one is best:
                because.append(f"best evaluation ({one.loss:.4f})")
            if rules.keep_days and facts.now - one.time <= rules.keep_days * DAY:
                because.append(f"of the last {rules.keep_days:g} days")
        if not because and (reason := _stays(one, one in good, counted, newest, facts.refused)):
            because = [reason]
        decisions[one.step] = tuple(because)
    return decisions


def _stays(one: Step, is_good: bool, counted: Sequence[int], newest: int | None, refused: Collection[int]) -> str:
    """Why a step without any claim is left alone; empty where it goes."""
    if not counted or newest is None:
        return "there is no good step to take its place"
    if one.step > newest:
        return "beyond the newest save of this start"
    if one.step in refused:
        return "" if one.step < newest else "may be saved again"
    if not is_good and one.step >= counted[0]:
        return "not readable; goes when the good ones are newer"
    return ""


def squeezed(keep: int, sizes: Sequence[int], free: int) -> int:
    """How many of the newest steps a disk has room for: `keep`, or less where the next save would not fit.

    `sizes`: bytes of the newest steps, the newest first; `free`: bytes that are free now. The next save is taken to be
    as large as the newest, and as much again stays free. Never below LEAST, unless `keep` is.
    """
    if not sizes:
        return keep
    wanted = 2 * sizes[0]
    while keep > LEAST and free < wanted:
        keep -= 1
        free += sum(sizes[keep : keep + 1])
    return keep
