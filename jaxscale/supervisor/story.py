"""What happened in a run, told by the lines of its events.jsonl and metrics.jsonl. Pure.

`Story` is a fold: lines go in by growing time, and it knows the world, the state, and every *interruption*: a time in
which training stood, because of a fault, a resize, a preemption or a stop. An interruption ends with the first line of
metrics of a later epoch at a step that was never reached before: replaying is not yet progress. What a person should
read comes out as sentences. Read next: `show.py`, `status.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxscale.supervisor.follow import Told, time_of
from jaxscale.supervisor.states import State

GROWS = "a larger world can be formed"
"""The reason that the coordinator gives for handing over to a larger world."""

WORKER = re.compile(r"worker of (\S+) (.*)", re.DOTALL)
"""How `evidence.sentence` begins."""

REJECTIONS = 3
"""Damaged copies that are told of in each epoch; events.jsonl has all of them."""


@dataclass
class Interruption:
    """Training stood."""

    kind: Literal["fault", "resize", "preemption", "stop"]
    epoch: int
    """That it ended."""
    noticed: float
    """Seconds since 1970, likewise below."""
    text: str
    fault_class: str = ""
    host: str = ""
    unnoticed: float = 0.0
    """Seconds that it had lasted when it was noticed: a hang, a host that is silent."""
    reached: int = 0
    """The highest step in metrics.jsonl before it."""
    last_step_at: float = 0.0
    back_at: float = 0.0
    """0 = training has not gone on."""
    back_step: int = 0
    is_told: bool = False
    is_cut: bool = False
    """The whole run ended before training went on."""

    @property
    def began(self) -> float:
        """A fault: when it happened, as far as is known. Otherwise the last step before it."""
        if self.kind == "fault":
            return self.noticed - self.unnoticed
        return self.last_step_at or self.noticed

    @property
    def is_open(self) -> bool:
        return not self.back_at and not self.is_cut

    def seconds(self, now: float) -> float:
        """How long it took, or has taken by now."""
        return max(0.0, (self.back_at or now) - self.began)


@dataclass(frozen=True)
class Restored:
    """Where an epoch's state came from."""

    step: int
    sources: Mapping[str, int]

    @property
    def text(self) -> str:
        if "durable" in self.sources:
            return "the durable checkpoint"
        return "memory" + (" of its peers" if "peer" in self.sources and "memory" not in self.sources else "")


@dataclass
class Story:
    """What is known after the lines so far."""

    metrics_from: float = 0.0
    """Time of the first metrics line at hand: what happened before it is judged by the states alone."""
    epoch: int = 0
    state: str = ""
    """Of the coordinator; empty for a run without one."""
    state_since: float = 0.0
    reason: str = ""
    line: Mapping[str, Any] = field(default_factory=dict)
    """The newest line of metrics."""
    interruptions: list[Interruption] = field(default_factory=list)
    restored: dict[int, Restored] = field(default_factory=dict)
    """By epoch."""
    sealed: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Tier -> (newest step that was sealed in it, when)."""
    interval: float | None = None
    """Seconds between durable steps, where the run chooses."""
    ended: str = ""
    """`done`, `stopped` or `failed`; empty while it runs."""
    last_at: float = 0.0
    """When the last line was written."""
    _hosts: dict[int, set[str]] = field(default_factory=dict)
    _agents: dict[str, int] = field(default_factory=dict)
    _highest: int = 0
    _last_step_at: float = 0.0
    _rejected: int = 0
    _is_new_start: bool = False
    _preempted: str = ""
    _alarm: str = ""

    def tell(self, told: Told) -> list[str]:
        """Takes a line; returns what is worth a sentence."""
        source, line = told
        self.last_at = max(self.last_at, time_of(line))
        if source == "metrics":
            return self._step(line)
        known = getattr(self, f"_on_{line.get('kind')}", None)
        try:
            sentences: list[str] = known(line) if known is not None else []
        except (KeyError, TypeError, ValueError):  # an event of another version: a person loses a line, not the view
            return []
        return sentences

    def hosts(self) -> list[str]:
        """Of the newest epoch whose workers have begun."""
        return sorted(self._hosts[max(self._hosts)]) if self._hosts else []

    def faults(self) -> list[Interruption]:
        return [one for one in self.interruptions if one.kind == "fault"]

    def is_standing(self) -> bool:
        """Whether training stands, or only repeats what it had done."""
        return any(one.is_open for one in self.interruptions)

    # Lines of metrics

    def _step(self, line: Mapping[str, Any]) -> list[str]:
        epoch, step, time = int(line.get("epoch") or 0), int(line["step"]), time_of(line)
        self.line, self.epoch = line, max(self.epoch, epoch)
        if not self.state:  # without a coordinator nobody says that it goes on
            self.ended = ""
        waiting = [one for one in self.interruptions if one.is_open]
        for one in waiting:
            if epoch <= one.epoch:  # the last words of the old epoch
                one.reached, one.last_step_at = max(one.reached, step), time
        back = [one for one in waiting if epoch > one.epoch and step > one.reached]
        self._highest, self._last_step_at = max(self._highest, step), time
        return self._back(back, step, time, epoch)

    def _back(self, back: list[Interruption], step: int, time: float, epoch: int) -> list[str]:
        for one in back:
            one.back_at, one.back_step = time, step
        if not back:
            return []
        since = min(back, key=lambda one: one.began)
        several = f" since the first of {len(back)}" if len(back) > 1 else ""
        return [f"back after {since.seconds(time):.1f} s{several} at step {step:,}: {self._world(epoch, since)}"]

    def _world(self, epoch: int, one: Interruption) -> str:
        count = len(self._hosts.get(epoch, ()))
        hosts = f", {count} host{'s' if count != 1 else ''}" if count else ""
        if (found := self.restored.get(epoch)) is None:
            return f"epoch {epoch}{hosts}, from the start: nothing was saved yet"
        again = max(0, one.reached - found.step)
        return f"epoch {epoch}{hosts}, restored from {found.text} ({again:,} step{'s' if again != 1 else ''} replayed)"

    # Events, by their kind

    def _on_state(self, event: Mapping[str, Any]) -> list[str]:
        before, self.state, self.reason = event["from"], event["to"], str(event["reason"])
        self.state_since, self.epoch = time_of(event), max(self.epoch, int(event["epoch"]))
        if before == State.WAITING and self.state == State.RUNNING:
            self._is_new_start = False
            return [f"the coordinator is back: {self.reason}, no worker was disturbed"]
        if self._is_new_start:
            self._start_anew()
        match self.state:
            case State.SUSPECT:
                self._open("fault", event, self.reason)
            case State.DRAINING:
                return self._draining(event)
            case State.RUNNING if self.state_since < self.metrics_from:
                back = [one for one in self.interruptions if one.is_open and one.epoch < int(event["epoch"])]
                return self._back(back, 0, self.state_since, int(event["epoch"]))
            case State.ESCALATED:
                self.ended = "failed"
            case State.DONE:
                self.ended = "stopped" if self.reason.startswith("stopped") else "done"
        return []

    def _draining(self, event: Mapping[str, Any]) -> list[str]:
        if self.reason == self._preempted:
            self._open("preemption", event, self.reason)
            return []
        if self.reason == GROWS:
            self._open("resize", event, self.reason)
            return [f"resize: {self.reason}"]
        self._open("stop", event, self.reason)
        return [f"stopping ({self.reason}): the workers save and end"]

    def _on_fault(self, event: Mapping[str, Any]) -> list[str]:
        untold = [one for one in self.faults() if one.is_open and not one.is_told]
        evidence = event["evidence"]
        epoch = max((int(e["epoch"]) for e in evidence), default=int(event["epoch"]))
        one = untold[-1] if untold else self._open("fault", {**event, "epoch": epoch}, "")
        one.text, one.fault_class, one.host = joined(event["cause"]), event["class"], event["host"]
        one.is_told = True
        silent = ("worker_hung", "host_lost")
        one.unnoticed = max((float(e["seconds"]) for e in evidence if e["kind"] in silent), default=0.0)
        return [f"fault: {one.text} ({one.fault_class})"]

    def _on_resized(self, event: Mapping[str, Any]) -> list[str]:
        before, after = event["slices_before"], event["slices_after"]
        slices = f" (slices: {before} before, {after} now)" if before != after else ""
        return [f"resized: {event['reason']}{slices}"]

    def _on_restored(self, event: Mapping[str, Any]) -> list[str]:
        found = self.restored[int(event["epoch"])] = Restored(int(event["step"]), event["sources"])
        if self.is_standing():
            return []  # the line that says that training went on will tell
        return [f"restored step {found.step:,} from {found.text}"]

    def _on_rejected(self, event: Mapping[str, Any]) -> list[str]:
        self._rejected += 1
        if self._rejected > REJECTIONS:
            return []
        what = f"{event['path']} {event['shard']}".strip()
        return [f"damaged: {event['tier']} copy of step {event['step']}, {what}: {event['reason']}; another is used"]

    def _on_sealed(self, event: Mapping[str, Any]) -> list[str]:
        self.sealed[str(event["tier"])] = (int(event["step"]), time_of(event))
        return []

    def _on_interval(self, event: Mapping[str, Any]) -> list[str]:
        self.interval = float(event["seconds"])
        return []

    def _on_alarm(self, event: Mapping[str, Any]) -> list[str]:
        if event["what"] == "preemption":
            self._preempted = str(event["detail"])
            return [f"preemption: {self._preempted}"]
        text = f"alarm: {event['what']}: {event['detail']}"
        is_new, self._alarm = text != self._alarm, text
        return [text] if is_new else []

    def _on_coordinator_started(self, _event: Mapping[str, Any]) -> list[str]:
        self._is_new_start, self.ended = True, ""
        return []

    def _on_agent_started(self, event: Mapping[str, Any]) -> list[str]:
        name, pid = str(event["host"]), int(event["pid"])
        known = self._agents.get(name)
        self._agents[name] = pid
        if known == pid:  # the same processes are there: it is the coordinator that was started again
            self._is_new_start = False
        return [f"the agent of {name} was started again"] if known not in (None, pid) and not self._is_new_start else []

    def _on_worker_started(self, event: Mapping[str, Any]) -> list[str]:
        self._hosts.setdefault(int(event["epoch"]), set()).add(str(event["host"]))
        self.epoch = max(self.epoch, int(event["epoch"]))
        self._rejected = 0
        if not self.state:
            self.ended = ""
        return []

    def _on_done(self, _event: Mapping[str, Any]) -> list[str]:
        self.ended = "done"
        return []

    # Small things

    def _open(self, kind: Any, event: Mapping[str, Any], text: str) -> Interruption:
        one = Interruption(kind, int(event["epoch"]), time_of(event), text)
        one.reached, one.last_step_at = self._highest, self._last_step_at
        self.interruptions.append(one)
        return one

    def _start_anew(self) -> None:
        """The processes of the run are new ones: nobody came back from what ended the old ones, memory is empty."""
        self._is_new_start = False
        self.sealed.pop("memory", None)
        for one in self.interruptions:
            one.is_cut = one.is_cut or one.is_open


def joined(cause: str) -> str:
    """A cause in which the same is said of several workers, said once."""
    hosts: dict[str, list[str]] = {}
    for part in cause.split("; "):
        match = WORKER.fullmatch(part)
        hosts.setdefault(match[2] if match else part, []).extend([match[1]] if match else [])
    return "; ".join(
        f"{'each ' if len(names) > 1 else ''}worker of {', '.join(names)} {said}" if names else said
        for said, names in hosts.items()
    )
