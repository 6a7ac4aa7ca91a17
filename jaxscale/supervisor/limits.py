"""How long a worker may stay in one section before it counts as hung: learned from how long the section took before.

limit = factor x p99 of the recent durations, between a floor and a ceiling; generous until there are enough of them.
Durations are kept by program, world size, section, and whether it was the first of its kind in an epoch (a first step
also loads its program), so that they outlive an epoch: a new one is watched closely from its second step on. What ended
in a fault is never learned from. Then, for a world whose members wait for each other: who of the overdue is to be
suspected. Read next: `domains.py`.
"""

from __future__ import annotations

import math
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxscale.supervisor.evidence import SECTIONS

TIE_SECONDS = 1.0
ORDER = ("start", "restore", "evaluate", "save", "data", "compile", "step", "finish")
"""In which order a worker passes the sections that carry the same number of updates (`train/loop.py`)."""

WAITING = frozenset({"start", "restore", "compile", "step", "evaluate", "save", "finish"})
"""Sections in which a worker may be waiting for its peers, so that being overdue there is no proof against it."""


@dataclass(frozen=True)
class Bounds:
    """Of one section's limit, in seconds."""

    floor: float
    """Never less: a busy machine stalls for so long without anything being wrong."""
    first: float
    """Until there are `enough` durations; also the floor of a first of its kind in an epoch."""
    ceiling: float
    """Never more, however slow it was before."""
    enough: int = 8


BOUNDS: Mapping[str, Bounds] = types.MappingProxyType(
    {
        "start": Bounds(floor=20, first=120, ceiling=600, enough=3),
        "restore": Bounds(floor=10, first=300, ceiling=1800, enough=3),
        "compile": Bounds(floor=60, first=3600, ceiling=7200, enough=3),
        "data": Bounds(floor=2, first=120, ceiling=600),
        "step": Bounds(floor=1, first=120, ceiling=1800),
        "evaluate": Bounds(floor=10, first=600, ceiling=3600),
        "save": Bounds(floor=2, first=300, ceiling=1800, enough=3),
        # The last state of an epoch is waited for until it is safe, however large it is and slow the disk.
        "finish": Bounds(floor=300, first=600, ceiling=3600, enough=3),
    }
)


@dataclass(frozen=True)
class LimitConfig:
    """How limits are learned."""

    factor: float = 5.0
    window: int = 128
    """Durations kept of each kind."""
    bounds: Mapping[str, Bounds] = field(default_factory=lambda: BOUNDS)

    def __post_init__(self) -> None:
        if absent := [section for section in SECTIONS if section not in self.bounds]:
            raise ValueError(
                f"no bounds for the sections {', '.join(absent)}; each of {', '.join(SECTIONS)} needs some"
            )


@dataclass(frozen=True)
class Kind:
    """What is expected to take the same time whenever it happens."""

    section: str
    program: str = ""
    """Identity of the compiled program (its digest), where the section runs one."""
    world: int = 1
    """Members: a step of three hosts takes another time than one of four."""
    first: bool = False
    """The first of its section in this epoch."""


@dataclass(frozen=True)
class Position:
    """Where a worker is, as its progress record says."""

    host: str
    kind: Kind
    step: int
    entered: float
    """Monotonic seconds, of the clock that `now` is read from."""
    rank: int = 0
    stopped: bool = False
    """Its process was stopped by a signal: no doubt who hangs."""


@dataclass(frozen=True)
class Pace:
    """Durations so far, newest last. Immutable: `learned` gives another one."""

    config: LimitConfig = field(default_factory=LimitConfig)
    durations: Mapping[Kind, tuple[float, ...]] = field(default_factory=dict)

    def learned(self, kind: Kind, seconds: float, *, fault: bool = False) -> Pace:
        """With one more duration. `fault`: it ended in one (or was being fenced), so it says nothing."""
        if fault or not math.isfinite(seconds) or seconds < 0:
            return self
        recent = (*self.durations.get(kind, ()), seconds)[-self.config.window :]
        return replace(self, durations={**self.durations, kind: recent})

    def limit(self, kind: Kind) -> float:
        """Seconds that `kind` may take."""
        bounds = self.config.bounds[kind.section]
        recent = self.durations.get(kind, ())
        if len(recent) < bounds.enough:
            return bounds.first
        # The single longest is left out: one hiccup must not make the watch blind for a whole window.
        usual = percentile(sorted(recent)[:-1], 0.99) if len(recent) > 1 else recent[0]
        floor = max(bounds.floor, min(bounds.first, bounds.floor * 10)) if kind.first else bounds.floor
        return min(max(floor, self.config.factor * usual), bounds.ceiling)

    def overdue(self, kind: Kind, entered: float, now: float) -> float | None:
        """Seconds over the limit; None while there is time left."""
        over = now - entered - self.limit(kind)
        return over if over > 0 else None

    def recent(self, count: int) -> Pace:
        """With the newest `count` durations of each kind."""
        return replace(self, durations={kind: seconds[-count:] for kind, seconds in self.durations.items()})

    def to_json(self) -> list[dict[str, Any]]:
        """For a coordinator that takes over."""
        return [
            {
                "section": kind.section,
                "program": kind.program,
                "world": kind.world,
                "first": kind.first,
                "seconds": list(seconds),
            }
            for kind, seconds in self.durations.items()
        ]

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]], config: LimitConfig | None = None) -> Pace:
        """What `to_json` gave."""
        durations = {
            Kind(entry["section"], entry["program"], entry["world"], entry["first"]): tuple(entry["seconds"])
            for entry in data
        }
        return cls(config or LimitConfig(), durations)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of values in growing order."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def suspects(positions: Sequence[Position], pace: Pace, now: float) -> tuple[Position, ...]:
    """Who hangs, in a world whose members wait for each other; empty while nobody does.

    One that is overdue where it works for itself (`data`) hangs. One that is overdue where it may be waiting for the
    others is suspected only if it is behind them, or if nobody is: the others wait for the rearmost. As long as the
    rearmost has time left in its own section (it compiles, it saves), nobody hangs: the waiting is explained.
    """
    late = [p for p in positions if pace.overdue(p.kind, p.entered, now) is not None]
    if not late:
        return ()
    if stopped := tuple(p for p in late if p.stopped):
        return stopped
    alone = tuple(p for p in late if p.kind.section not in WAITING)
    if alone:
        return alone
    different = odd_ones(positions)
    if not any(p in late for p in different):
        return ()
    # Who entered a moment later than another one at the same place is no less a suspect.
    return tuple(p for p in different if now + TIE_SECONDS - p.entered > pace.limit(p.kind))


def odd_ones(positions: Sequence[Position]) -> tuple[Position, ...]:
    """Those whom the others wait for: the rearmost; all where nobody differs.

    Where the workers are at two places only, and fewer ahead than behind, those ahead are the odd ones: most agree on
    a place, and a few have left it without giving what the others still wait for.
    """
    places = Counter(_place(p) for p in positions)
    if len(places) <= 1:
        return tuple(positions)
    rear, ahead = min(places), max(places)
    if len(places) == 2 and places[ahead] < places[rear]:
        return tuple(p for p in positions if _place(p) == ahead)
    return tuple(p for p in positions if _place(p) == rear)


def _place(position: Position) -> tuple[int, int]:
    return (position.step, ORDER.index(position.kind.section))
