"""The seams of the training loop: what it offers to a checkpointer, a supervisor and a display.

The loop knows only these protocols. A supervisor implements them with shared memory, a plain run with Orbax and a
terminal; the loop is the same. Read next: `train/loop.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from jaxscale.data.tokenizer import Tokenizer
    from jaxscale.train.programs import Programs
    from jaxscale.train.summary import Summary

Section = Literal["compile", "data", "step", "evaluate", "save", "finish", "restore"]


class ExitReason(enum.Enum):
    """Why a worker ended. Only COMPLETED is success; each has its own process exit code."""

    COMPLETED = 0
    FAILED = 1
    STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command goes on


class Outcome(NamedTuple):
    """How a worker ended."""

    reason: ExitReason
    step: int
    """Updates done."""
    asked: str
    """Who or what asked for a stop; empty where nobody did."""


@dataclass(frozen=True)
class World:
    """The processes that train together. A single process is a world of one."""

    processes: int = 1
    index: int = 0
    address: str = ""
    """host:port of the coordination service; empty for a world of one."""
    epoch: int = 1
    """Incarnation of the world: grows with every restart on the same run directory."""
    host: str = ""
    """Name of this process's host in its job; empty = the machine's own."""

    @property
    def is_writer(self) -> bool:
        """The one process that writes metrics and prints."""
        return self.index == 0


@dataclass(frozen=True)
class Record:
    """Everything of a committed state that is not an array. JSON-safe; equal on all hosts."""

    step: int
    """Optimizer steps done."""
    row: int
    """Next global row of data."""
    config: Mapping[str, Any]
    """`config.to_dict` of the run."""
    data: Mapping[str, Any]
    """Identity of the data (`data.source.Source.identity`): content hash of each corpus, tokenizer hash."""
    environment: Mapping[str, Any]
    metrics_line: Mapping[str, Any]
    """The step's line of metrics.jsonl; empty at step 0."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Best evaluation metrics so far."""
    epoch: int = 1


class Snapshot(Protocol):
    """Where states go. After every step `wants` says whether its state is offered; the last one always is.

    Both are called at the same steps by all processes.
    """

    def wants(self, step: int) -> bool:
        """Whether to `offer` this step's state: the loop then first finishes the step and its metrics line."""
        ...

    def offer(self, step: int, state: Mapping[str, Any], record: Record, *, final: bool = False) -> None:
        """Takes the state as it is after `step` updates, and returns quickly: training waits meanwhile.

        Arrays may be donated to the next step right after. `final`: last state of this process, offered whether it was
        wanted or not; keep it and return only when it is safe.
        """
        ...

    def close(self) -> None:
        """Waits for what is under way. Raises what failed in the background."""
        ...


class MetricsSink(Protocol):
    """Receives finished lines, one step late, on the writer process only."""

    def write(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Progress(Protocol):
    """Told which section the loop enters; a display or a watchdog listens."""

    def enter(self, section: Section, step: int) -> None: ...


class StopRequest(Protocol):
    """Looked at in every section: whether this run shall save and stop."""

    def requested(self) -> str:
        """The reason, or an empty string."""
        ...


@dataclass(frozen=True)
class Start:
    """What is known when everything has been checked and training is about to start."""

    summary: Summary
    environment: Mapping[str, Any]
    tokenizer: Tokenizer | None
    """None: the rows are no text."""
    flops_per_token: float
    devices: Sequence[Any]
    """The `jax.Device`s of the mesh."""
    metrics_line: Mapping[str, Any]
    """Of the restored record: written again if the file lost it."""


Restore = Callable[[Mapping[str, Any]], "tuple[dict[str, Any], Record] | None"]
"""Abstract state (ShapeDtypeStructs with shardings) -> state on these devices and its record; None = start afresh."""


@dataclass(frozen=True)
class Sinks:
    """Everything the loop talks to, one implementation for a plain run, another under a supervisor."""

    begin: Callable[[Start], None]
    """Called once, after all checks and before the first compilation: the first moment a run may leave traces."""
    snapshot: Snapshot
    metrics: MetricsSink
    progress: Progress
    stop: StopRequest
    message: Callable[[str], None]
    """A line for people, on the writer process."""
    event: Callable[..., None]
    """`event(kind, **fields)`: a line of events.jsonl; the worker calls it on the writer process only."""
    directory: Path
    """The run directory, for traces and samples."""
    programs: Programs
    """Where compiled programs come from."""
