"""What a coordinator answers to who asks how the run stands. Read next: `status.py`, which asks."""

from __future__ import annotations

from typing import Any

from jaxscale.supervisor.ballot import Ballot
from jaxscale.supervisor.machine import Machine


def status_answer(machine: Machine, ballot: Ballot[Any]) -> dict[str, Any]:
    """JSON-safe."""
    epoch = machine.epoch
    return {
        "state": machine.state.value,
        "term": list(ballot.term),
        "missing_votes": ballot.missing,
        "epoch": machine.number,
        "members": list(epoch.world.members) if epoch is not None else [],
        "mesh": dict(epoch.world.mesh) if epoch is not None else {},
        "committed": epoch.commits.committed if epoch is not None else -1,
        "hosts": {
            name: {"slice": host.slice, "connected": host.is_connected, "progress": dict(host.progress)}
            for name, host in machine.hosts.items()
        },
    }
