"""Notice of the end of a host before it comes: a file that a cloud's agent makes, or a command that asks the cloud.

SIGTERM to any process of the host says the same (`agent.py`); some clouds only write it down somewhere. Read next:
`agent.py`.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import shutil
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


def check_command(command: str) -> None:
    """Raises ValueError for a command that cannot be run here: one that never gives notice would be found too late."""
    try:
        program = shlex.split(command)[0]
    except IndexError:
        raise ValueError("is empty; give a program and its arguments") from None
    except ValueError as error:
        raise ValueError(f"{command!r} cannot be read: {error}; quote it as for a shell") from None
    if shutil.which(program) is None:
        raise ValueError(
            f"{command!r} cannot be run: there is no program {program!r}; install it, or give its path (no shell reads "
            "the command: for one give sh -c '...')"
        )


async def notice(maintenance: Maintenance, tell: Callable[[str], None]) -> None:
    """Calls `tell` with what gave notice, each time anew while it stands (whoever hears it may be another one by then).

    Runs until it is cancelled.
    """
    trouble = ""
    while maintenance.file or maintenance.command:
        if maintenance.file and Path(maintenance.file).exists():
            tell(f"{maintenance.file} is there")
        if maintenance.command:
            says_so, before = False, trouble
            try:
                says_so, trouble = await _says_so(maintenance.command), ""
            except CannotAsk as error:
                trouble = str(error)
            if trouble and trouble != before:  # said once, not every second
                logger.warning("the maintenance command %r %s", maintenance.command, trouble)
            if says_so:
                tell(f"{maintenance.command!r} says so")
        await asyncio.sleep(maintenance.every_seconds)
    await asyncio.Event().wait()


class CannotAsk(RuntimeError):
    """The command did not answer. The message goes on where its name ends."""


async def _says_so(command: str) -> bool:
    """Raises CannotAsk."""
    try:
        program, *arguments = shlex.split(command)  # ValueError also where there is no word
        process = await asyncio.create_subprocess_exec(
            program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
        )
    except (OSError, ValueError) as error:
        raise CannotAsk(f"cannot be run: {error}") from error
    try:
        return await asyncio.wait_for(process.wait(), ASK_SECONDS) == 0
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise CannotAsk(f"took longer than {ASK_SECONDS:g} s") from error
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
