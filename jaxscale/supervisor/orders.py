"""What a coordinator tells agents to do: the order to work, which has a member's rank, where it joins, what it restores
and whom it copies to; and the fields that every order must have. Pure.

Read next: `jobs.py`, what the agent makes of an order to work.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from jaxscale.checkpoint.interval import AUTO
from jaxscale.supervisor.cadence import FIRST_STEPS, UNDECIDED, Cadence
from jaxscale.supervisor.facts import Epoch, Hosts, Settings, Tell, World
from jaxscale.supervisor.placement import buddies

FIELDS: Mapping[str, Mapping[str, type | types.UnionType]] = types.MappingProxyType(
    {
        "welcome": {"run": str, "recipe": str, "arguments": list, "command": list},
        "serve": {"epoch": int, "processes": int},
        "work": {
            "epoch": int,
            "rank": int,
            "members": list,
            "address": str,
            "mesh": dict,
            "devices": int,
            "every": int,
            "generations": int,
            "choice": dict | None,
            "smaller": dict | None,
            "peers": dict,
            "copies_to": list,
        },
        "fence": {"epoch": int},
        "verdict": {"committed": int, "decided": int, "since": int, "every": int},
        "end": {"code": int},
    }
)
"""Of each order that has any, as an agent reads it."""


def check(order: Mapping[str, Any]) -> None:
    """Whether an agent can carry it out. Raises ValueError that names the field; orders without fields pass."""
    do = order.get("do")
    for name, kind in FIELDS.get(str(do), {}).items():
        if name not in order:
            raise ValueError(f"the order to {do} has no {name!r}")
        if not isinstance(order[name], kind) or isinstance(order[name], bool):
            wanted = getattr(kind, "__name__", kind)
            raise ValueError(f"{name!r} of the order to {do} is {str(order[name])[:40]!r}, not of type {wanted}")


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
