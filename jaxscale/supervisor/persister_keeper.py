"""An agent's persister: started at the first order, started again after it died, given one order at a time.

Read next: `persister.py`, the process itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CLOSE_SECONDS = 2.0


class PersisterKeeper:
    """One host's persister, whichever process that is at the moment."""

    def __init__(self, folder: Path, job: str, say: Callable[..., None]) -> None:
        """`folder`: the host's, in shared memory. `say(kind, **fields)`: to the coordinator."""
        self._folder, self._job, self._say = folder, job, say
        self._process: asyncio.subprocess.Process | None = None
        self._killed: list[asyncio.subprocess.Process] = []
        """Those whose end the loop may not have heard of."""
        self._task: asyncio.Task[None] | None = None

    def order(self, epoch: int, step: int, target: Path) -> None:
        """Writes this host's part of a step, in the background; what was under way is given up."""
        self.stop()
        message = {"epoch": epoch, "step": step, "folder": str(self._folder), "job": self._job, "target": str(target)}
        self._task = asyncio.create_task(self._work(message))

    def stop(self) -> None:
        """Gives up what is under way, at once: its process is ended."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._kill()

    async def close(self) -> None:
        """Ends the process."""
        self.stop()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                for process in self._killed:
                    await _gone(process)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._process is not None:
            self._killed = [old for old in self._killed if old.returncode is None] + [self._process]
        self._process = None

    async def _work(self, message: Mapping[str, Any]) -> None:
        place = {"epoch": message["epoch"], "step": message["step"]}
        try:
            process = await self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
            answer = json.loads(line) if line else {"reason": "the persister ended; see the log of the host"}
        except (OSError, ValueError) as error:
            answer = {"reason": f"the persister could not work: {error}"}
        if "epoch" not in answer:  # it is dead, perhaps before the loop has heard so; the next order gets another
            self._kill()
        if "reason" in answer:
            self._say("unpersisted", **place, reason=str(answer["reason"]))
        else:
            self._say("persisted", **place, bytes=answer["bytes"], seconds=answer["seconds"])

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            command = (sys.executable, "-m", "jaxscale.supervisor.persister")
            self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        return self._process


async def _gone(process: asyncio.subprocess.Process) -> None:
    """Returns when its pipes are closed too: a loop that ends before leaves a traceback on stderr."""
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):
        await process.stdout.read()
    await process.wait()
    await asyncio.sleep(0)
