"""What the coordinator's mind is made of: hosts, the epoch under way, what it can do, and what it asks of others.

Plain data and one protocol, without behaviour. Read next: `machine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from jaxscale.checkpoint.cover import Damaged
from jaxscale.supervisor import evidence as ev
from jaxscale.supervisor.budget import Mark
from jaxscale.supervisor.commits import MemoryCommits
from jaxscale.supervisor.persisting import Persisting
from jaxscale.supervisor.states import State

LEASE_SECONDS = 2.0
"""A host whose agent was not heard of for this long is lost."""


@dataclass(frozen=True)
class Tell:
    """A message to an agent."""

    host: str
    message: Mapping[str, Any]


@dataclass(frozen=True)
class Note:
    """A line of events.jsonl."""

    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Finish:
    """The run is over."""

    code: int
    text: str


@dataclass(frozen=True)
class Store:
    """Something to do in the durable tier; `Machine.stored` is told how it went."""

    what: Literal["room", "finalise"]
    step: int
    epoch: int
    ranks: int
    mesh: Mapping[str, int]


Action = Tell | Note | Finish | Store


@dataclass
class Host:
    """What is known of a host."""

    name: str
    slice: int
    """-1 = a spare for any slice."""
    devices: int
    """That it emulates; 0 = the real ones, of which there are as many as the run asks for on each host."""
    peer: str = ""
    """Address of its slot server."""
    control: str = ""
    """Address at which its agent can be told of another coordinator."""
    pid: int = 0
    """Of its agent."""
    is_connected: bool = False
    is_ready: bool = False
    """Its zygote can fork."""
    is_leaving: bool = False
    """It was told to end (preempted): nothing new is started there."""
    is_deaf: bool = False
    """It did not end an epoch's worker in time."""
    heard: float = 0.0
    fenced: int = 0
    """The newest epoch that it has ended."""
    copies: list[Any] = field(default_factory=list)
    """Memory slots that lie there, as of the last look."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    committed: int = -1
    """The newest memory checkpoint that it was told of as committed."""
    work: Mapping[str, Any] | None = None
    """What its worker was started with, where one runs: tells a new coordinator of the epoch under way."""
    took: list[tuple[str, float, bool]] = field(default_factory=list)
    """(section, seconds, is it the first of the epoch): how long its worker's sections took, for a new coordinator."""

    def is_usable(self, now: float) -> bool:
        """Whether a worker can be started there now."""
        can = self.is_connected and self.is_ready and not self.is_leaving and not self.is_deaf
        return can and now - self.heard < LEASE_SECONDS


@dataclass(frozen=True)
class World:
    """A world to form: who is in it, in the order of ranks, and on what mesh."""

    members: tuple[str, ...]
    slices: Mapping[str, int]
    """Slice in which each member counts; a spare counts in the one that it stands in for."""
    mesh: Mapping[str, int]
    devices: int
    """To emulate, over all members; 0 = real ones."""


@dataclass
class Epoch:
    """The epoch under way."""

    number: int
    world: World
    start_step: int
    choice: Mapping[str, Any] | None
    service: str
    """Host of the coordination service."""
    commits: MemoryCommits
    persisting: Persisting = field(default_factory=lambda: Persisting((), 0, -1))
    address: str = ""
    started: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    warmed: set[str] = field(default_factory=set)
    ended: dict[str, int] = field(default_factory=dict)
    """Members whose worker finished, with its exit code."""
    final_step: int = -1
    """Where they finished."""
    kept: str = ""
    """Tier that holds the state of that step, as its workers said: `durable`, or `memory`."""
    plain: int = -1
    """From this step on its workers save into the durable tier themselves; -1 = not."""
    is_closing: bool = False
    """All ended well, and the hosts were asked what they hold."""

    def misses(self, host: Host) -> bool:
        """Whether a worker of this epoch should run there, and its agent knows of none."""
        is_expected = host.name in self.started and host.name not in self.ended
        return is_expected and (host.work is None or host.work["epoch"] != self.number)

    def done_in(self, state: State) -> Collection[str]:
        """Members that have done what the state waits for."""
        by_state: dict[State, Collection[str]] = {
            State.FORMING: self.started,
            State.RESTORING: self.begun,
            State.WARMING: self.warmed,
            State.DRAINING: self.ended,
        }
        return by_state.get(state, ())


@dataclass(frozen=True)
class Verdict:
    """What a fault means. `stop`: nothing helps; `text` is what the user reads, the traceback last."""

    fault_class: str
    cause: str
    host: str
    evidence: tuple[Mapping[str, Any], ...]
    stop: bool = False
    text: str = ""
    delay: float = 0.0
    """Seconds to wait before the next epoch is formed."""

    def note(self) -> Note:
        """Its event."""
        fields = {"class": self.fault_class, "cause": self.cause, "host": self.host}
        return Note("fault", fields | {"evidence": [dict(e) for e in self.evidence]})


Hosts = Mapping[str, Host]


class Judge(Protocol):
    """Decides what a fault means and which world comes next; see `judge.py`."""

    def judge(
        self, evidence: Sequence[ev.Evidence], hosts: Hosts, epoch: int, reached: Mark, now: float
    ) -> Verdict: ...

    def came(self, name: str, reached: Mark) -> None: ...

    def world(self, hosts: Hosts, waited: float, now: float) -> World | None: ...

    def smaller(self) -> World | None: ...

    def could_grow(self, hosts: Hosts, now: float) -> bool: ...

    def refusal(self) -> str: ...

    def gives_up(self, there: int, waited: float) -> bool: ...

    def to_json(self) -> dict[str, Any]: ...

    def take_over(self, data: Mapping[str, Any]) -> None: ...


Start = tuple[int, Mapping[str, Any] | None]
"""Where an epoch starts: the step, and the choice of memory slots (None: the durable tier, or a fresh start)."""

Source = Callable[[Hosts, Sequence[tuple[int, int]], Collection[Damaged]], Start]
"""Looks for the best start in what hosts hold, given the lineage and what turned out damaged."""


@dataclass(frozen=True)
class Settings:
    """What the machine needs to know of the run."""

    steps: int
    every: int | Literal["auto"]
    """Steps between memory checkpoints; 0 = none; `auto`: from measured cost (`cadence.py`)."""
    generations: int
    replicas: int
    durable_every: int | Literal["auto"] = 0
    """Steps between durable checkpoints; 0 = only the last state; `auto`: from measured cost (`durable_pace.py`)."""
    durable: int = -1
    """The newest durable step there is at the start."""
    durable_age: float = 0.0
    """Seconds since it came to exist; 0 where there is none."""
    durable_apart: float = 1800.0
    """Seconds between durable checkpoints at most, where `auto` chooses."""
    checkpoints: str = ""
    """Folder of the durable steps, as all hosts see it."""
    lease_seconds: float = LEASE_SECONDS
    adopt_seconds: float = 5.0
    """How long a coordinator that takes over waits for all members of the world; who is not there then is lost."""
