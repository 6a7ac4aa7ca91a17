"""The folder in shared memory of a job that `launch` starts, and those of jobs whose processes are all gone.

A launcher that is killed cannot delete its folder: the job's token and the hosts' memory would stay until the machine
is started again. So the next one deletes what nobody can use any more. Two signs tell that a job lives: somebody holds
a lock on its folder (the launcher, coordinator and agents do, and it is seen from other containers too), or a process
names the folder. Read next: `launch.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = re.compile(r"jaxscale-([0-9a-f]{16})-.+")
YOUNG_SECONDS = 60.0
"""A folder that was changed since is left alone: its processes may not have started yet."""


def shared_memory() -> Path:
    """Where jobs have their folders."""
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())


def make_folder(job: str, root: Path) -> tuple[Path, int]:
    """A folder for this job (16 hexadecimal digits) and a descriptor that locks it, for every process that is to count.

    The lock is free once all who have the descriptor are gone; nobody has to give it back.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"jaxscale-{job}-", dir=root))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return folder, lock


def sweep(root: Path) -> list[Path]:
    """Deletes the folders of this user's jobs that are over, and returns them. What cannot be deleted stays."""
    swept: list[Path] = []
    for folder in sorted(root.glob("jaxscale-*")):
        match = FOLDER.fullmatch(folder.name)
        try:
            if match is None or not _is_ours_and_old(folder):
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if next(processes_of(folder, match[1]), None) is None:
                shutil.rmtree(folder, ignore_errors=True)
                swept += [] if folder.exists() else [folder]
        except OSError:  # somebody holds it
            continue
        finally:
            os.close(lock)
    return swept


def processes_of(folder: Path, job: str) -> Iterator[int]:
    """Pids of other processes that name the folder or the job: in their command line, or in the environment that they
    were started with, as forked workers do.
    """
    words = os.fsencode(folder), job.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        said = b""
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):  # it ended, or is another user's
                said += (entry / name).read_bytes()
        if any(word in said for word in words):
            yield int(entry.name)


def _is_ours_and_old(folder: Path) -> bool:
    status = folder.lstat()
    return status.st_uid == os.geteuid() and time.time() - status.st_mtime > YOUNG_SECONDS
