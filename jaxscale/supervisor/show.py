"""What `jaxscale launch` prints: a screen at the start, progress, each fault in two lines, a last line.

It follows what the run writes (`follow.py`, `story.py`) as any other process could: neither the coordinator nor the
workers know of it, and whatever happens to it disturbs no training. It imports no JAX. Read next: `status.py`, the same
for a run that somebody else started.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jaxscale.checkpoint.layout import newest_step
from jaxscale.config import CheckpointConfig, Config
from jaxscale.supervisor.follow import Follower, Told, offsets_of
from jaxscale.supervisor.last_words import stopped_line
from jaxscale.supervisor.states import State
from jaxscale.supervisor.story import Interruption, Story
from jaxscale.train.display import Display, last_line
from jaxscale.train.protocols import ExitReason

if TYPE_CHECKING:
    from jaxscale.supervisor.launch import ClusterShape

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
VERDICTS = {"done": ExitReason.COMPLETED, "stopped": ExitReason.STOPPED, "failed": ExitReason.FAILED}
"""How a story ends, and what that means to whoever started the run."""


class Show:
    """Call `poll` some times a second, and `finish` once the coordinator has ended for good."""

    def __init__(self, config: Config, shape: ClusterShape, stream: IO[str] | None = None) -> None:
        """To be made before the coordinator starts: what is in the run directory by now is not shown."""
        self._config, self._shape = config, shape
        self._stream = stream if stream is not None else sys.stdout
        self._offsets = {folder: offsets_of(folder) for folder in _candidates(config)}
        self._folder = Path()
        """As the user would write it."""
        self._follower: Follower | None = None
        self._display = Display(config.steps, unit=config.model.unit, stream=self._stream)
        self._story = Story()
        self._is_over = self._is_silent = False
        self.step = 0
        """The highest that this run has reached since it was started."""
        self.verdict: int | None = None
        """The run's exit code, once a coordinator has said that it is over; its agents leave with it."""

    def poll(self, coordinator: int) -> None:
        """Prints what is new. `coordinator`: its pid, by which the run directory is known that it has locked."""
        try:
            if self._follower is None:
                self._find(coordinator)
            for told in self._follower.new() if self._follower is not None else ():
                self._show(told)
        except OSError:  # nobody reads any more (`| head`), or the disk is away: training is not to end by that
            self._silence()

    def say(self, text: str) -> None:
        """Prints a line of the launcher's own."""
        try:
            self._display.message(text)
        except OSError:
            self._silence()

    def finish(self, coordinator: int, code: int, why: str = "") -> None:
        """Prints the last line. `code`: of the run; the words for a failure are the coordinator's own, on stderr.
        `why`: what ended the run, where it was not the coordinator.
        """
        self.poll(coordinator)
        if self._is_over or self._follower is None:
            return
        try:
            if code == ExitReason.COMPLETED.value:
                text = last_line(ExitReason.COMPLETED, self._config.steps, self._config.steps, str(self._folder))
                self._display.finish(text + survived(self._story.interruptions))
            elif code == ExitReason.STOPPED.value:
                step = int(self._story.line.get("step", 0))
                durable = newest_step(self._folder / CHECKPOINTS)
                self._display.finish(stopped_line(step, self._config.steps, durable, str(self._folder), why))
            elif self._stream.isatty():
                self._display.close()
        except OSError:
            self._silence()
        self._is_over = True

    def _find(self, coordinator: int) -> None:
        for folder in _candidates(self._config):
            if _holder(folder) == coordinator:
                self._follower = Follower(folder, self._offsets.get(folder))
                self._folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
                self._display.open(screen(self._config, self._shape, self._folder))
                return

    def _show(self, told: Told) -> None:
        source, line = told
        is_first = not self._story.line
        if source == "metrics":
            self.step = max(self.step, int(line["step"]))
        sentences = self._story.tell(told)
        if line.get("kind") == "state" and self._story.ended:
            self.verdict = VERDICTS[self._story.ended].value
        if self._is_over:
            return
        for sentence in sentences:
            self._display.message(sentence)
        if source == "metrics" and not self._story.is_standing():
            self._display.enter("step", line["step"])
            self._display.write(line)
        elif line.get("kind") == "state":
            self._enter(line, is_first)

    def _enter(self, event: Mapping[str, Any], is_first: bool) -> None:
        step = int(self._story.line.get("step", 0))
        if event.get("to") == State.SUSPECT:
            self._display.enter("restore", step)
        elif event.get("to") == State.WARMING and is_first:
            restored = self._story.restored.get(self._story.epoch)
            self._display.enter("compile", restored.step if restored is not None else 0)
        elif event.get("to") == State.ESCALATED:
            self._display.close()  # now, so that the coordinator's words are the last ones
            self._is_over = True

    def _silence(self) -> None:
        """Nothing is printed any more; how far the run has got is still followed."""
        if self._is_silent:
            return
        self._is_silent = True
        self._display = Display(self._config.steps, enabled=False)
        if self._stream is sys.stdout:  # or Python would complain at exit of what it could not write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def screen(config: Config, shape: ClusterShape, folder: Path) -> list[str]:
    """What is about to run, and where."""
    slices, hosts, devices = shape.slices, shape.hosts_per_slice, shape.devices_per_host
    spares = f", {shape.spares} to spare" if shape.spares else ""
    memory, durable = config.memory, config.checkpoint
    often = "as often as is worth its cost" if memory.every == "auto" else f"every {_count(memory.every, 'step')}"
    rows = [
        ("model", numbers(config.model)),
        ("cluster", f"{_count(slices, 'slice')} x {_count(hosts, 'host')} x {_count(devices, 'device')}{spares}"),
        (
            "memory",
            f"a checkpoint {often}, {_copies(memory.replicas, slices * hosts)}" if memory.every else "no checkpoints",
        ),
        (
            "durable",
            f"a checkpoint {_often(durable)}, the newest {durable.keep} are kept"
            if durable.every
            else "a checkpoint at the end",
        ),
        (
            "step",
            f"{config.data.batch} rows x {config.data.sequence} tokens"
            if config.model.unit == "tokens"
            else f"{config.data.batch} {config.model.unit}",
        ),
        ("run", f"{folder} (watch it with: jaxscale status {folder} --watch)"),
        ("steps", f"{config.steps:,}"),
    ]
    return [config.name, *(f"  {name:<7} {text}" for name, text in rows)]


def _often(durable: CheckpointConfig) -> str:
    if durable.every == "auto":
        return f"as often as is worth its cost, at most {durable.apart:g} s apart"
    return f"every {_count(durable.every, 'step')}"


def numbers(model: Any) -> str:
    """The whole numbers of a model's config, in their order: `vocabulary 512, layers 2, width 128`."""
    values = ((field.name, getattr(model, field.name)) for field in dataclasses.fields(model))
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in values if type(value) is int and value)


def survived(interruptions: Sequence[Interruption]) -> str:
    """`; survived 2 faults, 1 resize: 4.1 s without training`, or nothing."""
    over = [one for one in interruptions if one.back_at]
    if not over:
        return ""
    kinds = [(kind, sum(one.kind == kind for one in over)) for kind in ("fault", "resize", "preemption")]
    spans = sorted((one.began, one.back_at) for one in over)
    seconds, until = 0.0, 0.0
    for begin, end in spans:  # faults during a recovery count once
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    what = ", ".join(_count(count, kind) for kind, count in kinds if count)
    return f"; survived {what}: {seconds:.1f} s without training"


def _copies(wanted: int, hosts: int) -> str:
    """How many other hosts keep a copy: there cannot be more than there are other hosts."""
    copies = min(wanted, hosts - 1)
    if hosts == 1:
        return "no copy: there is no other host"
    kept = f"{copies} {'copy' if copies == 1 else 'copies'} at other hosts" if copies else "no copy at other hosts"
    return kept if copies == wanted else f"{kept}, not {wanted}: there are no more hosts"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _candidates(config: Config) -> list[Path]:
    """Where the run directory is or may come to be: without --run.dir its name has a hash that only JAX can tell."""
    if config.run.dir:
        return [Path(config.run.dir).absolute()]
    return [Path(found).absolute() for found in glob.glob(f"runs/{glob.escape(config.name)}-*")]


def _holder(folder: Path) -> int:
    """Pid of the process that locked a run directory; 0 = none."""
    try:
        words = (folder / LOCK).read_text().split()
        return int(words[words.index("pid") + 1])
    except (OSError, ValueError, IndexError):
        return 0
