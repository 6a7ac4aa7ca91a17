"""Notice of the end of a host before it comes: a file that a cloud's agent makes, or a command that asks the cloud.

SIGTERM to any process of the host says the same (`agent.py`); some clouds only write it down somewhere. Read next:
`agent.py`.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ASK_SECONDS = 10.0
"""A command may take so long."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Maintenance:
    """Where notice is given; empty: not there."""

    file: str = ""
    """Its existence is the notice."""
    command: str = ""
    """Exit code 0 is the notice; run without a shell."""
    every_seconds: float = 1.0


async def notice(maintenance: Maintenance, tell: Callable[[str], None]) -> None:
    """Calls `tell` with what gave notice, each time anew while it stands (whoever hears it may be another one by then).

    Runs until it is cancelled.
    """
    while maintenance.file or maintenance.command:
        if maintenance.file and Path(maintenance.file).exists():
            tell(f"{maintenance.file} is there")
        if maintenance.command and await _says_so(maintenance.command):
            tell(f"{maintenance.command!r} says so")
        await asyncio.sleep(maintenance.every_seconds)
    await asyncio.Event().wait()


async def _says_so(command: str) -> bool:
    try:
        program, *arguments = shlex.split(command)  # ValueError also where there is no word
        process = await asyncio.create_subprocess_exec(
            program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
        )
    except (OSError, ValueError) as error:
        logger.warning("the maintenance command %r cannot be run: %s", command, error)
        return False
    try:
        return await asyncio.wait_for(process.wait(), ASK_SECONDS) == 0
    except TimeoutError:
        process.kill()
        await process.wait()
        logger.warning("the maintenance command %r took longer than %g s", command, ASK_SECONDS)
        return False
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
