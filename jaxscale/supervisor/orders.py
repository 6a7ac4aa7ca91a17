"""The order to work that each member of an epoch gets: its rank, where to join, what to restore, whom to copy to. Pure.

Read next: `jobs.py`, what the agent makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxscale.supervisor.cadence import AUTO, FIRST_STEPS, UNDECIDED, Cadence
from jaxscale.supervisor.facts import Epoch, Hosts, Settings, Tell, World
from jaxscale.supervisor.placement import buddies


def work_orders(
    epoch: Epoch,
    hosts: Hosts,
    settings: Settings,
    smaller: World | None,
    memo: Mapping[str, Any],
    cadence: Cadence = UNDECIDED,
) -> list[Tell]:
    """One message per member, in the order of ranks. The epoch's service is listening already.

    `smaller`: the world after the next loss, for which members compile ahead. `cadence`: how often to save into memory,
    where that was decided and not set.
    """
    every = (cadence.every or FIRST_STEPS) if settings.every == AUTO else settings.every
    world = epoch.world
    # A member whose stream is broken just now is still somebody's buddy.
    peers = {name: host.peer for name, host in hosts.items() if host.is_connected or name in world.members}
    ahead = None
    if smaller is not None:
        ahead = {"mesh": dict(smaller.mesh), "devices": smaller.devices, "processes": len(smaller.members)}
    return [
        Tell(
            name,
            {
                "do": "work",
                "epoch": epoch.number,
                "rank": rank,
                "members": list(world.members),
                "address": epoch.address,
                "mesh": dict(world.mesh),
                "devices": world.devices,
                "every": every,
                "generations": settings.generations,
                "choice": epoch.choice,
                "smaller": ahead,
                "peers": peers,
                "copies_to": list(buddies(name, world.members, world.slices, settings.replicas)),
                "memo": memo,
            },
        )
        for rank, name in enumerate(world.members)
    ]
