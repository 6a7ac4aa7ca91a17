"""What an agent tells a zygote to fork: one worker of one epoch, or the epoch's coordination service.

Plain data, written as JSON into the host's shared-memory folder and read by the forked process. Read next: `zygote.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WorkerJob:
    """Everything a worker needs beside the recipe, which its zygote has imported."""

    job: str
    """Id of the launched run."""
    host: str
    epoch: int
    rank: int
    processes: int
    address: str
    """host:port of the epoch's coordination service."""
    mesh: Mapping[str, int]
    """Sizes of the mesh axes of this world."""
    devices: int
    """Devices of this world to emulate; 0 = the real ones there are."""
    listen: str
    """Address of this host, where the workers of the others reach this one."""
    folder: str
    """The host's shared-memory folder."""
    run: str
    """Run directory."""
    programs: str
    """Folder of this host's compiled programs."""
    every: int
    """Steps between memory checkpoints; 0 = none."""
    generations: int
    choice: Mapping[str, Any] | None = None
    """The memory checkpoint to start from (`checkpoint/cover.py`); None = the durable tier, or a fresh start."""
    smaller: Mapping[str, Any] | None = None
    """`mesh`, `devices` and `processes` of the world after the next loss, to compile for; None where there is none."""
    peers: Mapping[str, str] = field(default_factory=dict)
    """Host -> address of its agent's slot server."""
    owner: str = ""
    """What the run's owner is known by: this job, told from another cluster's of the same name."""

    def write(self, folder: Path) -> Path:
        """Mode 0600; whole or not at all. Those of earlier epochs go: no worker of theirs may start any more."""
        path = folder / f"job-{self.epoch}.json"
        for old in folder.glob("job-*.json"):
            old.unlink(missing_ok=True)
        fresh = path.with_name(path.name + ".partial")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(dataclasses.asdict(self), stream, default=dict)
        os.replace(fresh, path)
        return path


def read_job(path: Path) -> WorkerJob:
    """Raises OSError, ValueError and TypeError for what is no job."""
    return WorkerJob(**json.loads(path.read_bytes()))
