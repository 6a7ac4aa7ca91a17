"""Ends processes together with everything below them, also what has a session of its own and what forks meanwhile.

An agent that is stopped, or that died, ends nobody, and its workers lead sessions of their own: killing its process
group would leave them training. So all are stopped first, parents before children, until a look finds nobody new, and
only then killed. Each is held by a pidfd, which cannot come to mean another process. Linux only. Read next:
`launch.py`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable

from jaxscale.supervisor.process_stat import PARENT, children_of, living_stat_of

ROUNDS = 50
"""Looks for new children; stopped processes fork no more, so two or three are enough."""
GONE_SECONDS = 5.0
"""How long the kernel may take to clear away what was killed."""


def end_with_descendants(pids: Iterable[int]) -> None:
    """Kills these processes and everything below them, and waits until they are gone. One that has ended is no error.

    The caller makes sure that the pids are still those it means: they are its children, or were just looked up.
    """
    held: dict[int, int] = {}
    try:
        for pid in pids:
            _hold(pid, held)
        for _ in range(ROUNDS):
            found = [(child, parent) for parent in held for child in children_of(parent) if child not in held]
            if not found:
                break
            for child, parent in found:
                _hold(child, held, parent)
        for file in reversed(held.values()):
            _send(file, signal.SIGKILL)
        _wait_until_gone(list(held.values()))
    finally:
        for file in held.values():
            os.close(file)


def _hold(pid: int, held: dict[int, int], parent: int | None = None) -> None:
    """Stops a process and keeps a pidfd of it; not if it has ended, or is no child of `parent` (any more)."""
    if pid in held or pid == os.getpid():
        return
    try:
        file = os.pidfd_open(pid)
    except OSError:
        return
    # Only now: had it ended before and its pid come to somebody else, that one would have another parent.
    if parent is not None and _parent_of(pid) != parent:
        os.close(file)
        return
    held[pid] = file
    _send(file, signal.SIGSTOP)


def _send(file: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        signal.pidfd_send_signal(file, number)


def _parent_of(pid: int) -> int | None:
    """None for a process that has ended."""
    stat = living_stat_of(pid)
    return None if stat is None else int(stat[PARENT])


def _wait_until_gone(files: list[int]) -> None:
    """A pidfd is readable once its process has ended, whoever collects its exit code."""
    watch = select.poll()  # `select.select` cannot look at descriptors above 1023
    for file in files:
        watch.register(file, select.POLLIN)
    waiting, deadline = set(files), time.monotonic() + GONE_SECONDS
    while waiting and (left := deadline - time.monotonic()) > 0:
        for file, _ in watch.poll(left * 1000):
            watch.unregister(file)
            waiting.discard(file)
