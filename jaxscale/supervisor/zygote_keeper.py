"""Keeps a zygote on the host: starts it, starts another when it dies, and says which of its ends means what.

A zygote that raises says so with a traceback, and no other attempt on this code will be better: `zygote_failed`, which
ends a run that has not begun. One that was killed (by the kernel for its memory, by a person) or that fell silent says
nothing about the recipe: it is started again, each time a little later. One that was ended by SIGTERM was told that the
host is to end. Read next: `children.py`, the process itself; `agent.py`, for whom it is kept.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxscale.retry import RetryConfig, pause
from jaxscale.supervisor.children import Zygote, ZygoteDied, ZygoteFailed
from jaxscale.supervisor.records import MAILBOX, MAILBOX_VARIABLE

LOOK_SECONDS = 0.2
RAISED_SECONDS = 60.0
"""Before another attempt after it raised: the same code will raise again, but a file may have been mended since."""
DEATHS = 5
"""So many in a row, without a ready one between them, are no chance."""


class ZygoteKeeper:
    """One host's zygote, whichever process that is at the moment."""

    def __init__(
        self,
        folder: Path,
        devices: int,
        say: Callable[..., None],
        preempted: Callable[[str], None],
        make: Callable[[list[str], Path, Mapping[str, str]], Zygote] = Zygote,
    ) -> None:
        """`folder`: the host's, with its name; `devices`: to emulate, 0 = the real ones.

        `say(kind, **fields)`: to the coordinator; `preempted(why)`: the host is to end; `make`: a zygote that was not
        started, from its arguments, log and environment.
        """
        self._folder, self._say, self._preempted, self._make = folder, say, preempted, make
        emulated = {"JAX_PLATFORMS": "cpu"} if devices else {}
        self._environment = {MAILBOX_VARIABLE: str(folder / MAILBOX), **emulated}
        self._zygote: Zygote | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether it can fork."""
        return self._zygote is not None and self._zygote.ready

    def start(self, welcome: Mapping[str, Any]) -> None:
        """Keeps one of this run from here on until `close`. May be repeated."""
        if self._task is None:
            log = Path(welcome["run"]) / "logs" / f"{self._folder.name}.out"
            self._task = asyncio.create_task(self._keep([welcome["recipe"], *welcome["arguments"]], log))

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The zygote's answer. Raises ForkError where it refuses, and ZygoteFailed where it is not there."""
        if self._zygote is None or not self._zygote.ready:
            raise ZygoteFailed("the zygote is not ready yet")
        return await self._zygote.request(message)

    async def close(self) -> None:
        """Ends the zygote; no other one follows."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._zygote is not None:
            self._zygote.close()

    async def _keep(self, arguments: list[str], log: Path) -> None:
        deaths = 0
        while True:
            zygote = self._zygote = self._make(arguments, log, self._environment)
            try:
                await zygote.start()
            except (ZygoteDied, OSError) as error:
                zygote.close()
                if self._was_terminated(zygote):
                    return
                deaths += 1
                seconds = pause(RetryConfig(), deaths, random.random())
                self._tell_death(deaths, str(error), seconds)
                await asyncio.sleep(seconds)
                continue
            except ZygoteFailed as error:
                zygote.close()
                self._say("zygote_failed", text=str(error), raised=True)
                await asyncio.sleep(RAISED_SECONDS)
                continue
            deaths = 0
            self._say("ready", pid=zygote.pid)
            while not zygote.has_died():
                await asyncio.sleep(LOOK_SECONDS)
            self._say("unready")
            if self._was_terminated(zygote):
                return

    def _was_terminated(self, zygote: Zygote) -> bool:
        """Whether SIGTERM ended it, before it could tell the agent itself. A host that leaves needs no other zygote."""
        if zygote.exit is None or zygote.exit.signal != signal.SIGTERM:
            return False
        self._preempted("SIGTERM to the zygote")
        return True

    def _tell_death(self, deaths: int, text: str, seconds: float) -> None:
        if deaths >= DEATHS:
            self._say("zygote_failed", text=f"it died {deaths} times in a row, the last time: {text}", raised=False)
        else:
            detail = f"{self._folder.name}: {text}; another one is started in {seconds:.1f} s"
            self._say("alarm", what="zygote", detail=detail)
