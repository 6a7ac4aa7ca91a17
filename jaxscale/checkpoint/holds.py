"""Holds: small files that say "somebody reads this step", so that nobody deletes it meanwhile.

A hold counts while its process lives (on the host that wrote it) or until it expires (seen from another host); a dead
reader's does not count and is swept. A lock on the folder orders two moments: a reader that has written its hold and
then finds the step sealed has it until the end. Read next: `retention.py`, `prune.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxscale.checkpoint.layout import write_json
from jaxscale.supervisor.process_stat import STARTED, living_stat_of

HOLDS = "holds"
EXPIRES_SECONDS = 86400.0
"""After this a hold of another host counts no more: nobody here can see whether its process lives."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def holding(folder: Path, step: int, who: str, seconds: float = EXPIRES_SECONDS) -> Iterator[None]:
    """Holds a step of a run's checkpoints while the block runs. `who` is for people.

    Where no file can be written (somebody else's run, read only) the step is read without.
    """
    path = folder / HOLDS / f"{step}-{uuid.uuid4().hex[:12]}.json"
    value = {"step": step, "who": who, "host": _host(), "expires": time.time() + seconds, **_process(os.getpid())}
    is_held = False
    try:
        with locked(folder, fcntl.LOCK_SH):
            path.parent.mkdir(exist_ok=True)
            write_json(path, value)
            is_held = True
    except OSError as error:
        logger.debug("no hold on step %d of %s: %s", step, folder, error)
    try:
        yield
    finally:
        if is_held:
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # fails while there are others


def reading(folder: Path | None, step: int, who: str) -> contextlib.AbstractContextManager[None]:
    """As `holding`, where the checkpoints lie on this machine; elsewhere nothing is held."""
    return contextlib.nullcontext() if folder is None else holding(folder, step, who)


def held(folder: Path, now: float) -> dict[int, list[str]]:
    """Who reads which step at this moment. Files that are no holds are passed over."""
    found: dict[int, list[str]] = {}
    for _, hold in _read(folder):
        if hold is not None and _counts(hold, now):
            where = f"pid {hold['pid']}" + (f" on {hold['host']}" if hold["host"] != _host() else "")
            found.setdefault(hold["step"], []).append(f"{hold['who']} ({where})")
    return found


def sweep(folder: Path, now: float) -> int:
    """Deletes the holds of readers that are gone. Returns how many."""
    swept = 0
    for path, hold in _read(folder):
        if hold is not None and not _counts(hold, now):
            with contextlib.suppress(OSError):
                path.unlink()
                swept += 1
    if swept:
        with contextlib.suppress(OSError):
            (folder / HOLDS).rmdir()
    return swept


@contextlib.contextmanager
def locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """The folder's lock, for a moment; without one where the file system has none."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, how)
        yield
    finally:
        os.close(file)


def _read(folder: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    found = []
    try:
        paths = sorted((folder / HOLDS).glob("*.json"))
    except OSError:
        return []
    for path in paths:
        try:
            hold = json.loads(path.read_bytes())
            is_hold = all(isinstance(hold[name], kind) for name, kind in _FIELDS.items())
        except (OSError, ValueError, KeyError, TypeError):
            is_hold, hold = False, None
        found.append((path, hold if is_hold else None))
    return found


_FIELDS: dict[str, Any] = {
    "step": int,
    "who": str,
    "host": str,
    "pid": int,
    "started": str,
    "expires": (int, float),
}


def _counts(hold: dict[str, Any], now: float) -> bool:
    if hold["host"] == _host():
        return bool(_process(hold["pid"])["started"] == hold["started"] != "")
    return bool(now < hold["expires"])


def _process(pid: int) -> dict[str, Any]:
    """A process, told from another one of the same number by when it began; empty for one that is gone."""
    try:
        stat = living_stat_of(pid)
    except (ValueError, OverflowError):
        stat = None
    return {"pid": pid, "started": stat[STARTED] if stat else ""}


def _host() -> str:
    """The machine, and its boot: pids of before mean nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"
