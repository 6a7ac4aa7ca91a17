"""The states of a supervised run, which may follow which, and how long each may last. Pure data.

    FORMING -> RESTORING -> WARMING -> RUNNING -> SUSPECT -> FENCING -> DECIDING -> FORMING(e + 1)

WAITING is for enough hosts; from there a coordinator that was started again finds its epoch RUNNING. DRAINING, DONE and
ESCALATED are the ways out, and DRAINING leads to a world of other members. Read next: `machine.py`.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping

DEPOSED = 77
"""Exit code of a coordinator in whose place another one leads, or that nobody elected: the run goes on without it."""


class State(enum.StrEnum):
    """What the coordinator is doing."""

    WAITING = "WAITING"
    """For hosts: not enough of them are there to form a world."""
    FORMING = "FORMING"
    """The epoch's service is started and workers are forked."""
    RESTORING = "RESTORING"
    """Workers join, and load their state."""
    WARMING = "WARMING"
    """The first step: programs are loaded or compiled."""
    RUNNING = "RUNNING"
    SUSPECT = "SUSPECT"
    """Something was reported; more evidence may come."""
    FENCING = "FENCING"
    """The epoch is over: its workers are ended."""
    DECIDING = "DECIDING"
    DRAINING = "DRAINING"
    """Workers save and end at one step: the run is to stop, or the next epoch will have other members."""
    DONE = "DONE"
    ESCALATED = "ESCALATED"
    """Nothing that this program may do helps: it ends with the evidence."""


_ENDS = (State.SUSPECT, State.DRAINING, State.DECIDING, State.DONE, State.ESCALATED)

NEXT: Mapping[State, frozenset[State]] = types.MappingProxyType(
    {
        State.WAITING: frozenset({State.DECIDING, State.RUNNING, State.DONE, State.ESCALATED}),
        # A world may end by itself in any of these four: a person signalled a worker, or reports before were lost.
        State.FORMING: frozenset({State.RESTORING, *_ENDS}),
        State.RESTORING: frozenset({State.WARMING, *_ENDS}),
        State.WARMING: frozenset({State.RUNNING, *_ENDS}),
        State.RUNNING: frozenset(_ENDS),
        State.DRAINING: frozenset({State.SUSPECT, State.DONE, State.DECIDING, State.ESCALATED}),
        State.SUSPECT: frozenset({State.FENCING, State.ESCALATED}),
        State.FENCING: frozenset({State.DECIDING, State.ESCALATED}),
        State.DECIDING: frozenset({State.FORMING, State.WAITING, State.DONE, State.ESCALATED}),
        State.DONE: frozenset(),
        State.ESCALATED: frozenset(),
    }
)

DEADLINES: Mapping[State, float] = types.MappingProxyType(
    {
        State.FORMING: 20.0,
        State.RESTORING: 1800.0,
        State.WARMING: 1800.0,
        State.FENCING: 5.0,
        State.DRAINING: 120.0,
    }
)
"""Seconds. SUSPECT lasts as long as its window; DECIDING is left in the moment in which it is entered; WAITING and
RUNNING last as long as they must. How long a worker may take to join, restore and compile is learned (`limits.py`), so
the two deadlines for that are only for what nobody reports."""
HANDOVER_SECONDS = 25.0
"""The deadline of DRAINING where some hosts leave and the others go on: clouds give a notice of 30 s, and a world
that has not handed over by then goes on from its last memory checkpoint while the leaving hosts can still be read."""


def check(before: State, after: State) -> None:
    """Raises AssertionError for a step that the diagram does not have: a bug of ours, not of a run."""
    assert after in NEXT[before], f"{before} does not lead to {after}"
