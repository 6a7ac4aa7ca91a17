"""Whether the kernel ended a process because memory ran out: it counts such kills for each control group, and a killed
process itself only shows SIGKILL. Linux; both versions of control groups. Read next: `children.py`.
"""

from __future__ import annotations

from pathlib import Path

GROUPS, PROCESSES = Path("/sys/fs/cgroup"), Path("/proc")
COUNTERS = {"": "memory.events", "memory": "memory.oom_control"}
"""File with a line `oom_kill N`, by controller: version 2 has one tree for all of them, version 1 one for each."""


class MemoryKills:
    """Kills in the control group that a process is in now."""

    def __init__(self, pid: int, groups: Path = GROUPS, processes: Path = PROCESSES) -> None:
        self._counters = [file for file in _counters(pid, groups, processes) if file.is_file()]
        self._before = self._last = self._count()

    def look(self) -> None:
        """To be called every now and then: a kill that is longer ago than two looks was of another process."""
        self._before, self._last = self._last, self._count()

    def happened(self) -> bool:
        """Whether there was one since the look before the last one. False also where the kernel does not count."""
        return self._count() > self._before

    def _count(self) -> int:
        return sum(_read(file) for file in self._counters)


def _counters(pid: int, groups: Path, processes: Path) -> list[Path]:
    try:
        lines = (processes / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller, counter in COUNTERS.items():
            if controller in controllers.split(","):
                # In a container the path may be that of the host, which is not to be seen here: then the root is ours.
                inside = groups / controller / path.lstrip("/") / counter
                found.append(inside if inside.is_file() else groups / controller / counter)
    return found


def _read(file: Path) -> int:
    try:
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0
