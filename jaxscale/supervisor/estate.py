"""What an agent leaves to the next one on its host when it dies: its children, its orders, its port.

The worker trains on without an agent; the next agent finds it here and takes it over, with the memory slots that lie in
the same folder. A pid is only believed together with the time at which its process started. Read next: `agent.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxscale.supervisor.process_stat import STARTED, living_stat_of

ESTATE = "estate.json"


@dataclass(frozen=True)
class Heir:
    """A process that outlived its agent."""

    pid: int
    started: int
    """Clock ticks after boot, as /proc tells them."""
    epoch: int

    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        return started_at(self.pid) == self.started


@dataclass(frozen=True)
class Estate:
    """Everything that cannot be found out again."""

    fenced: int = 0
    port: int = 0
    """Of the slot server: workers and peers know it."""
    worker: Heir | None = None
    service: Heir | None = None
    order: Mapping[str, Any] | None = None
    """What the worker was started with."""

    def write(self, folder: Path) -> None:
        """Mode 0600; whole or not at all."""
        fresh = folder / f"{ESTATE}.partial"
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(asdict(self), stream)
        os.replace(fresh, folder / ESTATE)


def read_estate(folder: Path) -> Estate:
    """What the agent before left; an empty estate where there was none, or where it cannot be read."""
    try:
        said = json.loads((folder / ESTATE).read_bytes())
        heirs = {name: Heir(**said[name]) if said[name] else None for name in ("worker", "service")}
        return Estate(int(said["fenced"]), int(said["port"]), heirs["worker"], heirs["service"], said["order"])
    except (OSError, ValueError, KeyError, TypeError):
        return Estate()


def started_at(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None where there is none, or only its corpse."""
    stat = living_stat_of(pid)
    return None if stat is None else int(stat[STARTED])


def heir_of(pid: int, epoch: int) -> Heir | None:
    """A running process as the next agent will look for it."""
    started = started_at(pid)
    return None if started is None else Heir(pid, started, epoch)
