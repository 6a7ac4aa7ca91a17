"""How a coordinator that was started again, here or at another host, finds its run. Pure.

Two things are known: what was decided last (`decided`, the value that a majority of the voters has), and what each
agent's worker was started with. Read next: `ballot.py`, `machine.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxscale.supervisor.budget import Mark
from jaxscale.supervisor.commits import MemoryCommits
from jaxscale.supervisor.facts import Epoch, Host, Judge, World
from jaxscale.supervisor.limits import Pace

MEMO_DURATIONS = 16
"""Of each kind that go with an order: enough to know a limit."""


@dataclass(frozen=True)
class Found:
    """An epoch that runs without a coordinator."""

    epoch: Epoch
    there: frozenset[str]
    """Members that have said so."""
    judge: dict[str, Any]
    lineage: tuple[tuple[int, int], ...]
    reached: Mark
    pace: Pace
    """As it was when the epoch began."""


def memo_of(
    epoch: Epoch, judge: Judge, lineage: Sequence[tuple[int, int]], reached: Mark, pace: Pace
) -> dict[str, Any]:
    """What goes with the order to work, JSON-safe."""
    return {
        "judge": judge.to_json(),
        "lineage": [list(entry) for entry in lineage],
        "reached": [reached.step, reached.seconds],
        "pace": pace.recent(MEMO_DURATIONS).to_json(),
        "slices": dict(epoch.world.slices),
        "start_step": epoch.start_step,
    }


def decided(
    number: int,
    epoch: Epoch | None,
    is_over: bool,
    judge: Judge,
    lineage: Sequence[tuple[int, int]],
    drain: str,
    finish: int | None,
    agents: Mapping[str, str],
) -> dict[str, Any]:
    """What a coordinator must not forget, JSON-safe; every change of it is decided by a majority before it counts.

    finish: the exit code of a run that is over. agents: host -> where its agent can be told of another coordinator.
    """
    world = epoch.world if epoch is not None else None
    return {
        "epoch": number,
        "members": list(world.members) if world is not None else [],
        "is_over": is_over,
        "lineage": [list(entry) for entry in lineage],
        "judge": judge.to_json(),
        "drain": drain,
        "finish": finish,
        "agents": dict(agents),
    }


@dataclass(frozen=True)
class Past:
    """What an earlier coordinator of this run had decided."""

    number: int
    members: tuple[str, ...]
    is_over: bool
    """Its epoch was ended, or about to be."""
    lineage: tuple[tuple[int, int], ...]
    judge: Mapping[str, Any]
    drain: str
    finish: int | None
    agents: Mapping[str, str]


def past(value: Mapping[str, Any]) -> Past:
    """What `decided` gave."""
    lineage = tuple((int(number), int(step)) for number, step in value["lineage"])
    members = tuple(value["members"])
    ends = value["drain"], value["finish"]
    return Past(value["epoch"], members, value["is_over"], lineage, value["judge"], *ends, value["agents"])


def find_epoch(hosts: Iterable[Host]) -> Found:
    """The newest epoch of which a worker runs; at least one host has `work`. Its world is warm."""
    hosts = list(hosts)
    running = {host.name: host.work for host in hosts if host.work is not None}
    newest = max(work["epoch"] for work in running.values())
    there = frozenset(name for name, work in running.items() if work["epoch"] == newest)
    work = running[min(there)]
    memo, members = work["memo"], tuple(work["members"])
    world = World(members, memo["slices"], work["mesh"], work["devices"])
    committed = max(host.committed for host in hosts)
    commits = MemoryCommits(members, len(work["copies_to"]), committed)
    epoch = Epoch(newest, world, memo["start_step"], None, members[0], commits, address=work["address"])
    epoch.started, epoch.begun, epoch.warmed = set(members), set(members), set(members)
    lineage = tuple((int(number), int(step)) for number, step in memo["lineage"])
    return Found(epoch, there, memo["judge"], lineage, Mark(*memo["reached"]), Pace.from_json(memo["pace"]))
