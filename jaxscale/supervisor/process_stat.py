"""What Linux says of a process in /proc: read in one place, since its fields have numbers and no names.

Read next: `descendants.py`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

STATE, PARENT, FLAGS, STARTED = 0, 1, 6, 19
"""Places in `stat_of`; STARTED is in clock ticks after boot (proc(5), there counted from the pid on)."""
ENDED = ("Z", "X")
"""States of a process of which only its exit code is left."""


def stat_of(pid: int) -> list[str]:
    """The fields behind the name, which may hold blanks and brackets itself. Raises OSError where there is none."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def living_stat_of(pid: int) -> list[str] | None:
    """The same; None for a process that is gone, or of which only its exit code is left."""
    try:
        stat = stat_of(pid)
    except OSError:
        return None
    return stat if stat and stat[STATE] not in ENDED else None


def children_of(pid: int) -> list[int]:
    """Pids of the children of all threads of a process that have not ended; none where there is no such process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += [int(child) for child in task.read_text().split()]
    return [child for child in found if living_stat_of(child) is not None]
