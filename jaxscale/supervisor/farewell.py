"""The end of a run at its coordinator: it leaves only when every agent that may still train knows that all is over.

An agent that is told to end says so before it goes. A stream that breaks says nothing: its agent soon comes again
(a machine that stands for two seconds is enough), and who left meanwhile would leave a worker that trains for nobody.
Read next: `coordinator.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

FAREWELL_SECONDS = 5.0
"""How long agents get to end before the coordinator leaves."""
COME_SECONDS = 10.0
"""A host that has not come by then comes much later, or never."""
LOOK_SECONDS = 0.05
ENDED = "ended"
GOODBYE = {"do": "goodbye"}
"""The answer to an agent's last word: it was heard."""


class Farewell:
    """Who said that it ends."""

    def __init__(self, hosts: int) -> None:
        """`hosts`: how many are to come, now or soon."""
        self._hosts, self._began = hosts, time.monotonic()
        self._ended: set[str] = set()

    def heard(self, host: str, message: Mapping[str, Any], orders: asyncio.Queue[Mapping[str, Any]]) -> bool:
        """Whether this was an agent's last word; it is answered then."""
        if message.get("kind") != ENDED:
            return False
        self._ended.add(host)
        orders.put_nowait(GOODBYE)
        return True

    async def wait(self, told: Callable[[float], set[str]], came: Collection[str], ties: Collection[str]) -> None:
        """Until all hosts have said their last word and nobody is connected, or the time is over.

        `told`: who is to hear of the end at a time; `came` and `ties`: views of who was ever here and who is connected.
        """
        deadline = (now := time.monotonic()) + FAREWELL_SECONDS
        while now < deadline and (ties or not self._ended >= told(now) or self._awaits(len(came), now)):
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()

    def _awaits(self, came: int, now: float) -> bool:
        """All are started together: one that has not come yet would look for this coordinator, and wait, for ever."""
        return came < self._hosts and now - self._began < COME_SECONDS
