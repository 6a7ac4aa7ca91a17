"""What an agent can see of its worker without asking it: the progress record, and Python's stacks where it hangs.

Read next: `records.py`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscale.supervisor.children import Child
from jaxscale.supervisor.process_stat import STATE, stat_of
from jaxscale.supervisor.records import PROGRESS, STACKS, Progress, ProgressRecord, TornRecord

STACKS_SECONDS = 0.3
"""How long a hung worker gets to write its stacks before it is killed."""
STACKS_BYTES = 1 << 16
NOBODY: dict[str, Any] = {"epoch": 0}
"""Heartbeat of a host without a worker."""


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal or a debugger: the others only wait for it."""
    try:
        return stat_of(pid)[STATE] in ("T", "t")
    except (OSError, IndexError):
        return False


class WorkerView:
    """Reads the records of one host's worker, whichever process that is at the moment."""

    def __init__(self, folder: Path) -> None:
        self._stacks_file = folder / STACKS
        self._stacks_file.touch(mode=0o600)
        self._progress = ProgressRecord(folder / PROGRESS, create=True)
        self._told: dict[str, int] = {}
        """Sections of each kind whose durations were told."""

    def begin(self) -> None:
        """Another worker starts."""
        self._told = {}

    def heartbeat(self, worker: Child | None) -> dict[str, Any]:
        """Where the worker is, and how long the sections took that ended since the last call."""
        progress = None if worker is None or worker.exit is not None else self._read(worker.pid)
        if progress is None:
            return NOBODY
        return {
            "epoch": progress.epoch,
            "step": progress.step,
            "section": progress.section,
            "seconds": time.monotonic() - progress.entered,
            "finished": progress.finished,
            "stopped": is_stopped(progress.pid),
            "took": self._news(progress),
        }

    def took(self, worker: Child | None) -> list[tuple[str, float, bool]]:
        """What the record still has of how long sections took; for a coordinator that has not heard of it yet."""
        progress = None if worker is None or worker.exit is not None else self._read(worker.pid)
        return [] if progress is None else _durations(progress, {})

    def stuck_seconds(self, worker: Child | None) -> float:
        """How long the worker has been in the same step; 0 elsewhere, where long times mean nothing."""
        progress = None if worker is None or worker.exit is not None else self._read(worker.pid)
        is_step = progress is not None and progress.section == "step" and not progress.finished
        return time.monotonic() - progress.entered if progress is not None and is_step else 0.0

    def place(self, pid: int) -> dict[str, Any]:
        """Section and step where a worker was when it ended; empty where it never said so."""
        progress = self._read(pid)
        return {} if progress is None else {"section": progress.section, "step": progress.step}

    async def stacks(self, worker: Child) -> str:
        """Python's stacks of a worker. A stopped process writes nothing, so it is made to go on."""
        before = self._stacks_file.stat().st_size
        worker.send(signal.SIGUSR1)
        worker.send(signal.SIGCONT)
        deadline = time.monotonic() + STACKS_SECONDS
        size = before
        while time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            now = self._stacks_file.stat().st_size
            if now > before and now == size:  # all is written
                break
            size = now
        with open(self._stacks_file, "rb") as file:
            file.seek(before)
            return file.read(STACKS_BYTES).decode(errors="replace")

    def close(self) -> None:
        self._progress.close()

    def _read(self, pid: int) -> Progress | None:
        try:
            progress = self._progress.read()
        except TornRecord:  # killed while it wrote
            return None
        return progress if progress.pid == pid else None

    def _news(self, progress: Progress) -> list[tuple[str, float, bool]]:
        """(section, seconds, whether it was the first of its kind)."""
        news = _durations(progress, self._told)
        self._told = dict(progress.ended)
        return news


def _durations(progress: Progress, told: Mapping[str, int]) -> list[tuple[str, float, bool]]:
    """As `WorkerView._news`. `told`: how many of each section are known already."""
    found: list[tuple[str, float, bool]] = []
    for section, count in progress.ended.items():
        durations = progress.durations[section]
        new = min(count - told.get(section, 0), len(durations))
        recent = durations[len(durations) - new :] if new > 0 else ()
        found += [(section, seconds, count - new + i == 0) for i, seconds in enumerate(recent)]
    return found
