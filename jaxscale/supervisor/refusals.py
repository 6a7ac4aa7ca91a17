"""Alarms about refused connections, few enough that strangers who knock cannot fill the disk. Pure.

The first one of an address and a reason is told at once; what follows within a minute is counted and told in one line.
Read next: `coordinator.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

QUIET_SECONDS = 60.0
KNOWN = 100
"""So many addresses and reasons are told apart within a minute; all others are one."""
OTHERS = ("other addresses", "refused too")


@dataclass
class _Told:
    since: float
    more: int = 0


class Refusals:
    """Decides which refusal is an alarm."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], _Told] = {}

    def refused(self, peer: str, reason: str, now: float) -> str:
        """What to tell of it now; nothing where it was told of the like a moment ago."""
        key = (address_of(peer), reason)
        if key not in self._told and len(self._told) >= KNOWN:
            key = OTHERS
        if (told := self._told.get(key)) is not None:
            told.more += 1
            return ""
        self._told[key] = _Told(now)
        return f"{peer}: {reason}" if key != OTHERS else ": ".join(OTHERS)

    def due(self, now: float) -> list[str]:
        """What is to be told of those that were only counted, once their minute is over."""
        over = [(key, told) for key, told in self._told.items() if now - told.since >= QUIET_SECONDS]
        lines = []
        for (address, reason), told in over:
            del self._told[address, reason]
            if told.more:
                self._told[address, reason] = _Told(now)
                lines.append(f"{address}: {reason} ({told.more} more times in {now - told.since:.0f} s)")
        return lines


def address_of(peer: str) -> str:
    """A peer as gRPC names it (`ipv4:10.0.0.1:5123`) without its port, which is another one each time."""
    return peer.rpartition(":")[0] or peer
