"""What to do about a failure: a table, read from the top, the first row that fits decides. Pure.

    fatal        stop, with the evidence; trying again cannot help, or has been tried often enough
    recoverable  restore and go on; the second strike of a host, or its loss, changes the members
    transient    the same, and nobody is to blame

The rows speak of *faults*: one for each cause of a group (`domains.py`), with what is remembered of earlier ones
(`budget.py`). Whoever is only a victim never appears here, so survivors are never charged. `docs/supervisor.md` prints
RULES. Read next: `worlds.py`, which forms the world that a `Replace` or `Shrink` asks for.
"""

from __future__ import annotations

import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxscale.retry import RetryConfig, pause
from jaxscale.supervisor import worlds
from jaxscale.supervisor.budget import Allowance, History, Mark
from jaxscale.supervisor.causes import cause_of, is_code_that_cannot_start, is_crash
from jaxscale.supervisor.domains import Group
from jaxscale.supervisor.evidence import Evidence, HostLost, fingerprint, hosts_of, sentence, traceback_of
from jaxscale.supervisor.worlds import Host, PlannedWorld, Request

FaultClass = Literal["transient", "recoverable", "fatal"]
Remedy = Literal["retry", "replace", "shrink", "wait", "stop"]


@dataclass(frozen=True)
class Retry:
    """The same members form the next epoch and restore."""

    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Replace:
    """Spares take the places of hosts."""

    pairs: tuple[tuple[str, str], ...]
    """(host that leaves, spare that comes)."""


@dataclass(frozen=True)
class Shrink:
    """The next world does without these hosts; `worlds.plan` says which others have to go with them."""

    hosts: tuple[str, ...]
    slices: tuple[int, ...]
    """That no longer take part."""
    world: PlannedWorld


@dataclass(frozen=True)
class Wait:
    """Training stands until these hosts, or others for them, are there."""

    hosts: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """The run ends."""

    reason: str
    evidence: tuple[Evidence, ...]

    @property
    def text(self) -> str:
        """For people: the reason, what was seen, and the traceback last, where eyes go first."""
        traces = [trace.rstrip() for trace in dict.fromkeys(traceback_of(e) for e in self.evidence) if trace]
        seen = dict.fromkeys(f"  {sentence(e)}" for e in self.evidence)
        return "\n".join([self.reason, *seen, *traces[:1]])


Action = Retry | Replace | Shrink | Wait | Stop

ALLOWANCES: Mapping[str, Allowance] = types.MappingProxyType(
    {
        # strikes without progress, and the progress that pays one back: in new steps, or in seconds of new steps
        "memory": Allowance(1, steps=200, seconds=1800),
        "data": Allowance(3, steps=10, seconds=300),
        "collective": Allowance(3, steps=2, seconds=300),
        "error": Allowance(4, steps=2, seconds=300),
        "ended early": Allowance(3, steps=10, seconds=300),
        "shard": Allowance(8, steps=1, seconds=60),
    }
)

OTHER = Allowance(8, steps=2, seconds=300)
"""For every other cause: signals, hangs, phases that took too long, refusals."""


HOST = Allowance(1, steps=20, seconds=600)
"""Of each host."""


@dataclass(frozen=True)
class PolicyConfig:
    """What a recipe may choose."""

    on_loss: Literal["shrink", "wait"] = "shrink"
    """What to do without a host that nothing can replace."""
    allowances: Mapping[str, Allowance] = field(default_factory=lambda: ALLOWANCES)
    host: Allowance = HOST
    """Strikes of one host before its next one costs it its place."""
    crashes: int = 2
    """How often a crash (SIGSEGV and the like) at one and the same step may happen again before it is a bug."""
    job: str = ""
    """Whose pauses these are: jobs that fail in one moment must not all come back in one moment."""
    pauses: RetryConfig = field(default_factory=RetryConfig)
    """Before the next attempt with the same hosts: none after a cause's first fault, then longer each time."""

    def allowance(self, cause: str) -> Allowance:
        return self.allowances.get(cause, OTHER)


@dataclass(frozen=True)
class Situation:
    """The world in which it happened."""

    world: PlannedWorld
    spares: tuple[Host, ...]
    """Usable hosts that are no members."""
    request: Request
    reached: Mark
    """How far training has come."""


@dataclass(frozen=True)
class Fault:
    """One cause and what is remembered of the like. What the rows of the table look at."""

    evidence: Evidence
    cause: str
    strikes: int
    """Earlier faults of this cause that progress has not paid back."""
    spent: bool
    """With this one they are more than the cause's allowance."""
    repeats: int
    """How often this very failure was seen before without progress since."""
    charged: tuple[str, ...]
    """Hosts that get a strike for it; none where every member failed alike: then the program is the cause."""
    struck: tuple[str, ...]
    """Those of them that had their last strike already."""


@dataclass(frozen=True)
class Rule:
    """A row of the table."""

    name: str
    fault_class: FaultClass
    when: Callable[[Fault, PolicyConfig], bool]
    remedies: tuple[Remedy, ...]
    """The first that is possible is taken."""
    why: str


def _cause(name: str) -> Callable[[Fault, PolicyConfig], bool]:
    return lambda fault, _: fault.cause == name


RULES: tuple[Rule, ...] = (
    Rule(
        "code cannot start",
        "fatal",
        lambda fault, _: is_code_that_cannot_start(fault.evidence),
        ("stop",),
        "an import, a syntax or a config error is the same at every attempt",
    ),
    Rule(
        "same error twice",
        "fatal",
        lambda fault, _: fault.cause == "error" and fault.repeats >= 1,
        ("stop",),
        "it failed in the same place in the same way, and got no further in between: a bug",
    ),
    Rule(
        "same crash again and again",
        "fatal",
        lambda fault, config: is_crash(fault.evidence) and fault.repeats >= config.crashes,
        ("stop",),
        "native code crashes at one and the same step, whatever is restarted",
    ),
    Rule(
        "too often without progress",
        "fatal",
        lambda fault, _: fault.spent and fault.cause != "host",
        ("stop",),
        "its budget is used up, and only progress refills it",
    ),
    Rule(
        "host lost",
        "recoverable",
        _cause("host"),
        ("replace", "shrink", "wait"),
        "it is gone with its memory: a spare stands in, or fewer go on, or the recipe prefers to wait",
    ),
    Rule(
        "second strike of a host",
        "recoverable",
        lambda fault, _: bool(fault.struck),
        ("replace", "shrink", "retry"),
        "the first may be chance, the second is the machine",
    ),
    Rule("killed", "recoverable", _cause("signal"), ("retry",), "first strike: the same host gets another chance"),
    Rule("hung", "recoverable", _cause("hang"), ("retry",), "first strike, as above; its stacks are recorded"),
    Rule("out of memory", "recoverable", _cause("memory"), ("retry",), "once; the next time it is fatal"),
    Rule("error", "recoverable", _cause("error"), ("retry",), "once; the same one again is fatal"),
    Rule("ended early", "recoverable", _cause("ended early"), ("retry",), "it left while the others go on"),
    Rule("coordination service", "recoverable", _cause("epoch host"), ("retry",), "a new one starts with the epoch"),
    Rule("data worker", "transient", _cause("data"), ("retry",), "the loader starts anew at the exact row"),
    Rule("collective", "transient", _cause("collective"), ("retry",), "the network, not a host: nobody died"),
    Rule("damaged shard", "transient", _cause("shard"), ("retry",), "the restore goes on with another copy"),
    Rule("refused", "transient", _cause("refused"), ("retry",), "an agent was not ready"),
    Rule(
        "took too long",
        "transient",
        lambda fault, _: fault.cause.startswith("phase "),
        ("retry",),
        "a new epoch, a little later each time",
    ),
)

BLAMING = frozenset({"signal", "hang", "error", "host", "refused"})
"""Causes that are counted against a host; also a phase that names who is missing."""


@dataclass(frozen=True)
class Decision:
    """What the coordinator does, and what it writes into events.jsonl (`fault`: class, cause, host, evidence)."""

    fault_class: FaultClass
    cause: str
    rule: str
    hosts: tuple[str, ...]
    action: Action
    history: History
    """With this failure in it; the next decision starts from here."""
    why: str


def decide(group: Group, history: History, situation: Situation, config: PolicyConfig | None = None) -> Decision:
    """The decision on one failure. Raises ValueError for a group without causes: there is nothing to decide."""
    if not group.causes:
        raise ValueError("the group has no causes (only workers that were fenced?), so there is nothing to decide")
    config = config or PolicyConfig()
    faults = [_fault(evidence, group, history, situation, config) for evidence in group.causes]
    rule, fault = next((rule, fault) for rule in RULES for fault in faults if rule.when(fault, config))
    after = history.charged(
        situation.reached,
        {fault.cause: config.allowance(fault.cause) for fault in faults},
        dict.fromkeys(host for fault in faults for host in fault.charged),
        config.host,
        dict.fromkeys(fingerprint(fault.evidence) for fault in faults),
    )
    action = _action(rule, fault, faults, situation, config)
    return Decision(rule.fault_class, fault.cause, rule.name, group.hosts, action, after, rule.why)


def welcome(host: str, history: History, reached: Mark, config: PolicyConfig | None = None) -> bool:
    """Whether a host may be a member or a spare: it has no more strikes than are forgiven, or progress paid them."""
    config = config or PolicyConfig()
    return history.host_strikes(host, reached, config.host) <= config.host.strikes


def _fault(evidence: Evidence, group: Group, history: History, situation: Situation, config: PolicyConfig) -> Fault:
    cause, reached = cause_of(evidence), situation.reached
    allowance = config.allowance(cause)
    strikes = history.cause_strikes(cause, reached, allowance)
    blames = (cause in BLAMING or cause.startswith("phase ")) and not _everywhere(cause, group, situation)
    charged = tuple(host for host in hosts_of(evidence) if blames and host in group.hosts)
    return Fault(
        evidence=evidence,
        cause=cause,
        strikes=strikes,
        spent=strikes >= allowance.strikes,
        repeats=history.repeats(fingerprint(evidence), reached),
        charged=charged,
        struck=tuple(h for h in charged if history.host_strikes(h, reached, config.host) >= config.host.strikes),
    )


def _everywhere(cause: str, group: Group, situation: Situation) -> bool:
    """Whether every member fell to it: then no host is to blame, but the program that they all run, or its data."""
    fallen = {host for evidence in group.causes if cause_of(evidence) == cause for host in hosts_of(evidence)}
    return fallen.issuperset(situation.world.names) and cause != "host"


def _action(rule: Rule, fault: Fault, faults: Sequence[Fault], situation: Situation, config: PolicyConfig) -> Action:
    """The first remedy of the rule that is possible."""
    world = situation.world
    gone = [host for f in faults if isinstance(f.evidence, HostLost) for host in f.charged]
    struck = [host for f in faults for host in f.struck]
    leaving = tuple(host for host in dict.fromkeys([*gone, *struck]) if host in world.names)
    spares = tuple(spare for spare in situation.spares if spare.name not in leaving)
    for remedy in rule.remedies:
        if remedy == "stop":
            others = [f.evidence for f in faults if f is not fault]
            return Stop(f"{rule.name}: {sentence(fault.evidence)}; {rule.why}", (fault.evidence, *others))
        if remedy == "replace" and leaving and (pairs := worlds.replacements(world, leaving, spares)):
            return Replace(pairs)
        if remedy == "shrink" and leaving and config.on_loss == "shrink":
            left = [*(member for member in world.members if member.name not in leaving), *spares]
            if smaller := worlds.plan(situation.request, left, world):
                slices = tuple(index for index in world.slices if index not in smaller.slices)
                return Shrink(leaving, slices, smaller)
        if remedy == "wait" and leaving:
            return Wait(leaving)
        if remedy == "retry":
            break
    if not fault.strikes:
        return Retry()
    mark = f"{config.job} {situation.reached.step} {fault.strikes} {world.names}"  # chance, and yet a pure function
    return Retry(pause(config.pauses, fault.strikes, zlib.crc32(mark.encode()) / (1 << 32)))
