"""A host's folder in shared memory: who may use it, and how it goes away again. It holds memory, never a user's files.

The agent marks what it made, and holds a lock on the mark as long as it lives: a folder that somebody else made is
refused and never removed, and so is one that another living agent serves. What a killed agent left is taken over.
Read next: `agent.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

from jaxscale.supervisor.estate import ESTATE
from jaxscale.supervisor.records import MAILBOX, PROGRESS, STACKS, VERDICTS
from jaxscale.supervisor.slot_files import COPIES, HOST_NAME, OWN, SLOT_NAME

MARK = "agent.json"
LOCK_SECONDS = 2.0
"""How long the agent before may take to be gone: one that was killed gives its memory back first."""
POLL_SECONDS = 0.05

_FILES = re.compile(
    "|".join(map(re.escape, (MARK, ESTATE, MAILBOX, PROGRESS, STACKS, VERDICTS)))
    + rf"|{re.escape(ESTATE)}\.partial|vote\.json(\..*)?|job-[0-9]+\.json(\.partial)?"
)
_SLOTS = re.compile(rf"(\.incoming-[0-9]+|{SLOT_NAME.pattern})(\..*)?")


class HostFolderError(ValueError):
    """The folder cannot be this host's. The message says why, and what to give instead."""


class HostFolder:
    """The folder of one host, held by its agent from here on until `remove` or the agent's end."""

    def __init__(self, shared_memory: Path, host: str, job: str) -> None:
        """Makes it, or takes over what an agent of this job left. Raises HostFolderError before it touches anything."""
        self.path = shared_memory / host
        self.is_new = not self.path.exists()
        if not self.is_new or self.path.is_symlink():
            _check(self.path, job)
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self.path / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self._lock()
        except BaseException:
            os.close(self._file)
            raise
        mark = json.dumps({"job": job, "host": host, "pid": os.getpid()}).encode()
        os.pwrite(self._file, mark, 0)
        os.ftruncate(self._file, len(mark))

    def remove(self) -> None:
        """Everything goes, the mark last: what a kill leaves half removed is still known as an agent's.

        Nothing happens where the folder is no longer the one that this agent marked.
        """
        try:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self.path / MARK, follow_symlinks=False), os.fstat(self._file)):
                    self._empty()
                    (self.path / MARK).unlink()
                    self.path.rmdir()
        finally:
            os.close(self._file)

    def _empty(self) -> None:
        for path in list(self.path.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK:
                path.unlink(missing_ok=True)

    def _lock(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HostFolderError(
                        f"another agent (pid {_mark(self.path).get('pid', 'unknown')}) serves {self.path}; give each "
                        "agent of this machine a --host or a --shared-memory of its own, or end that one first"
                    ) from None
            time.sleep(POLL_SECONDS)


def _check(folder: Path, job: str) -> None:
    """Raises HostFolderError for what no agent of this job made."""
    if folder.is_symlink() or not folder.is_dir():
        raise HostFolderError(f"{folder} is no folder but a link or a file; give another --shared-memory or --host")
    whose = _mark(folder).get("job")
    if whose is not None and whose != job:
        raise HostFolderError(
            f"{folder} holds the memory of job {whose!r}, and this is job {job!r}; give another --shared-memory, or "
            "remove that folder if that job is over"
        )
    # Without a mark: empty, or what was left when somebody was killed while it was made or removed.
    foreign = None if whose is not None else _foreign(folder)
    if foreign is not None:
        raise HostFolderError(
            f"{folder} was not made by an agent ({foreign} is in it), and an agent's folder is removed with all that "
            "is in it when the run ends; give another --shared-memory or --host"
        )


def _mark(folder: Path) -> dict[str, object]:
    try:
        said = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _foreign(folder: Path) -> str | None:
    """What no agent puts into its folder; None where there is no such thing."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name in (OWN, COPIES):
            slots = path.glob("*") if path.name == OWN else path.glob("*/*")
            hosts = [] if path.name == OWN else [h for h in path.iterdir() if not HOST_NAME.fullmatch(h.name)]
            strange = [*hosts, *(slot for slot in slots if not _SLOTS.fullmatch(slot.name))]
            if strange:
                return str(strange[0].relative_to(folder))
        elif not _FILES.fullmatch(path.name) or (path.is_dir() and not path.is_symlink()):
            return path.name
    return None
