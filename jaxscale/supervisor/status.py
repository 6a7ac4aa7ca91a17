"""How a run stands, from its run directory alone: whoever trains it, on whatever machine, or nobody any more.

`look` reads config.json, events.jsonl, metrics.jsonl, locations.json, the lock and the names of the checkpoints; it
writes nothing and imports no JAX. Read next: `../commands/status.py`, which shows it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxscale.checkpoint import layout
from jaxscale.config import ConfigError
from jaxscale.supervisor.follow import EVENTS, METRICS, Follower, tail_offset, time_of
from jaxscale.supervisor.location_status import LocationStatus, read_locations
from jaxscale.supervisor.story import Interruption, Story

LOCK, CONFIG = ".lock", "config.json"
METRICS_BYTES = 16 << 20
"""How much of the end of metrics.jsonl is read: enough for the last faults, and little enough to wait for."""
SPEED_STEPS = 32
"""Steps that speed is averaged over."""
FAULTS = 5
"""Of the last ones."""

Life = Literal["starting", "running", "gone", "done", "stopped", "failed"]


class StatusError(ConfigError):
    """A folder that is no run directory. The message says why, and what to give."""


@dataclass(frozen=True)
class TierStatus:
    """The newest step that is complete in a tier."""

    step: int
    age_seconds: float
    behind: int
    """Steps that training is ahead of it."""


@dataclass(frozen=True)
class FaultStatus:
    """One fault, and what came of it."""

    text: str
    fault_class: str
    host: str
    age_seconds: float
    recovery_seconds: float | None
    """Until training went on; None: it has not."""
    step: int | None
    """At which it went on."""


@dataclass(frozen=True)
class RunStatus:
    """All that `jaxscale status` shows; `--json` prints these fields."""

    run: str
    name: str
    is_supervised: bool
    life: Life
    holder: str
    """Who holds the lock, or held it when it was killed; empty: nobody."""
    state: str
    """Of the coordinator; empty without one."""
    state_seconds: float
    reason: str
    epoch: int
    hosts: tuple[str, ...]
    mesh: Mapping[str, int] | None
    """Axes above 1; None: not known."""
    step: int
    steps: int
    loss: float | None
    steps_per_second: float | None
    step_age_seconds: float | None
    quiet_seconds: float | None
    """Since anything was written."""
    memory: TierStatus | None
    durable: TierStatus | None
    durable_interval_seconds: float | None
    """From one durable step to the next, where the run chooses; None: it does not, or has not yet."""
    locations: tuple[LocationStatus, ...]
    """Further places of durable checkpoints."""
    damaged: Mapping[str, int]
    """Lines that could not be read, by file; what they said is missing above."""
    fault_count: int
    faults: tuple[FaultStatus, ...]
    """The last ones, oldest first."""


class Watcher:
    """Looks at a run again and again, and reads only what is new."""

    def __init__(self, run: Path) -> None:
        """Raises StatusError for what is no run directory."""
        if not (run / CONFIG).is_file() and not (run / EVENTS).is_file():
            what = (
                f"has neither {CONFIG} nor {EVENTS}"
                if run.is_dir()
                else "is a file"
                if run.exists()
                else "is not there"
            )
            raise StatusError(f"{run} is not a run directory: it {what}; give the --run.dir of a run")
        self._run = run
        offset = tail_offset(run / METRICS, METRICS_BYTES)
        self._follower = Follower(run, {METRICS: offset})
        self._story = Story()
        self._from_start = offset == 0
        self._steps: deque[tuple[int, float]] = deque(maxlen=SPEED_STEPS)
        """Epoch and time of the last steps."""
        self._is_supervised = False

    def look(self, now: float) -> RunStatus:
        """`now`: seconds since 1970. Raises OSError where the files cannot be read."""
        self._read()
        story, config = self._story, _config(self._run)
        holder, is_held = lock_of(self._run)
        step = int(story.line.get("step", 0))
        life = _life(story, is_held)
        faults = story.faults()
        stays = life in ("starting", "running", "gone")  # memory goes with the processes that hold it
        return RunStatus(
            run=str(self._run),
            name=str(config.get("name", "")) or ("DAMAGED config.json:" if (self._run / CONFIG).exists() else ""),
            is_supervised=self._is_supervised,
            life=life,
            holder=holder,
            state=story.state,
            state_seconds=max(0.0, now - story.state_since) if story.state else 0.0,
            reason=story.reason,
            epoch=story.epoch,
            hosts=tuple(story.hosts()),
            mesh=_mesh(config),
            step=step,
            steps=int(config.get("steps", 0)),
            loss=story.line.get("loss"),
            steps_per_second=self._speed() if life == "running" else None,
            step_age_seconds=max(0.0, now - time_of(story.line)) if story.line else None,
            quiet_seconds=max(0.0, now - story.last_at) if story.last_at else None,
            memory=_tier(story.sealed.get("memory") if stays else None, step, now),
            durable=_tier(_durable(self._run / "checkpoints"), step, now),
            durable_interval_seconds=story.interval if life == "running" else None,
            locations=read_locations(self._run, step, now),
            damaged=self._follower.damaged,
            fault_count=len(faults),
            faults=tuple(_fault(one, now) for one in faults[-FAULTS:]),
        )

    def _read(self) -> None:
        new = self._follower.new()
        if not self._from_start:
            self._story.metrics_from = next((time_of(line) for source, line in new if source == "metrics"), 0.0)
            self._from_start = True
        for told in new:
            self._story.tell(told)
            source, line = told
            if source == "metrics":
                self._steps.append((int(line.get("epoch") or 0), time_of(line)))
            elif line.get("source") == "coordinator":
                self._is_supervised = True

    def _speed(self) -> float | None:
        """Steps a second of the newest epoch; its first step, which loads programs, is where the time begins."""
        times = [time for epoch, time in self._steps if epoch == self._story.epoch]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None


def to_json(status: RunStatus) -> dict[str, Any]:
    """Plain values."""
    return dataclasses.asdict(status)


def _life(story: Story, is_held: bool) -> Life:
    if story.ended in ("done", "stopped", "failed"):
        return story.ended  # type: ignore[return-value]  # mypy does not narrow a str by `in`
    if not is_held:
        return "gone"
    return "running" if story.line or story.state else "starting"


def lock_of(run: Path) -> tuple[str, bool]:
    """The words in the lock file, and whether a process holds it."""
    try:
        file = os.open(run / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return "", False
    try:
        words = os.pread(file, 4096, 0).decode(errors="replace").strip()
        if not words:  # given back at the end
            return "", False
        # Coordinators of one job hold it together: to know of them, nobody else may hold it for a moment.
        fcntl.flock(file, (fcntl.LOCK_EX if words.startswith("job ") else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return words, False
    except BlockingIOError:
        return words, True
    except OSError:  # a file system without locks
        return words, False
    finally:
        os.close(file)


def _config(run: Path) -> dict[str, Any]:
    """Of the newest epoch; empty before the first worker has begun."""
    try:
        config = json.loads((run / CONFIG).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _durable(folder: Path) -> tuple[int, float] | None:
    step = layout.newest_step(folder)
    made = None if step is None else layout.made_at(folder, step)
    return None if step is None or made is None else (step, made)


def _tier(found: tuple[int, float] | None, step: int, now: float) -> TierStatus | None:
    if found is None:
        return None
    return TierStatus(found[0], max(0.0, now - found[1]), max(0, step - found[0]))


def _fault(one: Interruption, now: float) -> FaultStatus:
    return FaultStatus(
        text=one.text,
        fault_class=one.fault_class,
        host=one.host,
        age_seconds=max(0.0, now - one.noticed),
        recovery_seconds=one.seconds(now) if one.back_at else None,
        step=one.back_step or None,
    )


def _mesh(config: Mapping[str, Any]) -> dict[str, int] | None:
    """Axes of more than one device; None where a mesh file or the machine decides (`mesh_sizes.resolve_sizes`)."""
    given = dict(config.get("mesh") or {})
    sizes = {axis: size or 1 for axis, size in given.items()}
    if given.get("fsdp") is None:  # it absorbs what is left
        if config.get("on") or not config.get("devices"):
            return None
        sizes["fsdp"] = config["devices"] // math.prod(sizes.values())
    return {axis: size for axis, size in sizes.items() if size > 1}
