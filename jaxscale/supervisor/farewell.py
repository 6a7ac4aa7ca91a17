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
LOOK_SECONDS = 0.05
ENDED = "ended"
GOODBYE = {"do": "goodbye"}
"""The answer to an agent's last word: it was heard."""


class Farewell:
    """Who said that it ends."""

    def __init__(self) -> None:
        self._ended: set[str] = set()

    def heard(self, host: str, message: Mapping[str, Any], orders: asyncio.Queue[Mapping[str, Any]]) -> bool:
        """Whether this was an agent's last word; it is answered then."""
        if message.get("kind") != ENDED:
            return False
        self._ended.add(host)
        orders.put_nowait(GOODBYE)
        return True

    async def wait(self, hosts: Callable[[float], Collection[str]], ties: Collection[str]) -> None:
        """Until all of `hosts`, asked for with the time, have said their last word and `ties`, a view of who is
        connected, is empty.
        """
        deadline = (now := time.monotonic()) + FAREWELL_SECONDS
        while (ties or not self._ended.issuperset(hosts(now))) and now < deadline:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
