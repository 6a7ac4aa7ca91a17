"""What the long-lived processes of a supervised run hold: open files, threads, files in shared memory.

Each recovery opens and closes many of them. One that is forgotten each time ends a run after days, so chaos counts
before the first fault and after the last one. Read next: `run.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxscale.testing.cluster import RunningCluster

MORE_OPEN_FILES = MORE_THREADS = 12
"""More of them than before the first fault are no leak yet: connections to new peers, calls under way."""
FILES_PER_HOST = 24
"""In shared memory, at most: progress records, slots and copies of two generations, what is being received."""


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    name: str
    open_files: int
    threads: int


def held(cluster: RunningCluster) -> dict[int, Held]:
    """pid -> what it holds, of the coordinator, the agents and the zygotes that live now."""
    hosts = {event["host"] for event in cluster.events("agent_started")}
    processes: dict[int, str] = {}
    with contextlib.suppress(IndexError, OSError):
        processes[cluster.coordinator()] = "the coordinator"
    for host in sorted(hosts):
        # A host that is lost has none of them, and one that just comes back not all.
        with contextlib.suppress(IndexError, OSError, StopIteration):
            processes[cluster.agent(host)] = f"the agent of {host}"
            processes[cluster.zygote(host)] = f"the zygote of {host}"
    found = {}
    for pid, name in processes.items():
        with contextlib.suppress(OSError):
            found[pid] = Held(name, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
    return found


def leaked(before: Mapping[int, Held], after: Mapping[int, Held]) -> list[str]:
    """What has grown in the processes that lived all the time: a line for each."""
    found = []
    for pid in sorted(before.keys() & after.keys()):
        was, now = before[pid], after[pid]
        if now.open_files > was.open_files + MORE_OPEN_FILES:
            found.append(f"{now.name} (pid {pid}) holds {now.open_files} open files, {was.open_files} at first")
        if now.threads > was.threads + MORE_THREADS:
            found.append(f"{now.name} (pid {pid}) has {now.threads} threads, {was.threads} at first")
    return found


def crowded(memory: Path) -> list[str]:
    """Hosts below `memory`, a job's folder in shared memory, that have more files there than a host needs."""
    found = []
    for host in sorted(path for path in memory.iterdir() if path.is_dir()) if memory.exists() else []:
        files = sum(path.is_file() for path in host.rglob("*"))
        if files > FILES_PER_HOST:
            found.append(f"{host.name} has {files} files in shared memory, and a host needs at most {FILES_PER_HOST}")
    return found
