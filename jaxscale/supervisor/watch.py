"""What heartbeats tell: where the members are, how long things take, how far training has come. Pure.

Read next: `limits.py`, which judges the positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxscale.supervisor.budget import Mark
from jaxscale.supervisor.facts import Epoch, Hosts
from jaxscale.supervisor.limits import Kind, Pace, Position


def positions(epoch: Epoch, hosts: Hosts) -> list[Position]:
    """Where the members are, as of their last heartbeats; clocks of hosts differ, so times are told as ages."""
    found = []
    for rank, name in enumerate(epoch.world.members):
        said = hosts[name].progress
        # After a worker's end its host tells of nobody, so its last place would grow old and pass for a hang.
        if said.get("epoch") == epoch.number and not said["finished"] and name not in epoch.ended:
            kind = Kind(said["section"], world=len(epoch.world.members), first=name not in epoch.warmed)
            found.append(Position(name, kind, said["step"], said["told"] - said["seconds"], rank, said["stopped"]))
    return found


def learned(pace: Pace, epoch: Epoch, took: Iterable[tuple[str, float, bool]]) -> Pace:
    """With more durations of sections of this epoch: (section, seconds, is it the first of the epoch)."""
    for section, seconds, first in took:
        pace = pace.learned(Kind(section, world=len(epoch.world.members), first=first), seconds)
    return pace


def progressed(reached: Mark, epoch: Epoch, heartbeat: Mapping[str, Any]) -> Mark:
    """How far training has come. Seconds count once for the whole world, and only where steps are new."""
    if heartbeat["step"] <= reached.step:
        return reached
    is_first = heartbeat["host"] == epoch.world.members[0]
    seconds = sum(took for section, took, _ in heartbeat["took"] if section == "step") if is_first else 0.0
    return Mark(heartbeat["step"], reached.seconds + seconds)
