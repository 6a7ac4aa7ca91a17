"""What can be known of a fault. Agents and workers report it, the coordinator judges it, events.jsonl keeps it.

Each kind is a frozen dataclass that survives JSON unchanged; every one carries the epoch in which it was seen, so that
what belongs to an earlier world is never held against a later one. Nothing here judges: `domains.py` (read it next)
tells causes from victims, `policy.py` decides.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal as signals
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

TEXT_LIMIT = 16_384
"""Characters of an error or a traceback that are kept. The end is what tells."""

START = "start"
"""Section of a worker that has not entered any: it imports, joins its world, prepares its backend."""

SECTIONS = (START, "restore", "compile", "data", "step", "evaluate", "save", "finish")
"""`train.protocols.Section`, and START."""


class EvidenceError(ValueError):
    """Evidence that cannot be read. The message names the kind and the field."""


@dataclass(frozen=True)
class WorkerExit:
    """A worker's process ended. Exactly one of `exit_code` and `signal` is set."""

    kind: ClassVar[str] = "worker_exit"
    host: str
    rank: int
    epoch: int
    exit_code: int | None = None
    signal: int | None = None
    error_class: str = ""
    """Name of the exception that ended it, where the worker could still say so."""
    error_text: str = ""
    traceback: str = ""
    section: str = START
    step: int = 0
    """Updates that the worker had done when it entered `section`."""
    collective: bool = False
    """The exception is a failed collective: a peer is the cause, or the network."""
    out_of_memory: bool = False
    """The kernel counted an out-of-memory kill of this process' group."""
    fenced: bool = False
    """Its own agent killed it, because the epoch had ended."""

    @property
    def ended_by(self) -> int | None:
        """The signal, also where a shell or container reports it as exit code 128 + signal."""
        if self.signal is not None:
            return self.signal
        code = self.exit_code or 0
        return code - 128 if 128 < code < 128 + signals.NSIG else None


@dataclass(frozen=True)
class WorkerError:
    """A worker reported an exception; its process may still be there."""

    kind: ClassVar[str] = "worker_error"
    host: str
    rank: int
    epoch: int
    error_class: str
    error_text: str
    traceback: str = ""
    section: str = START
    step: int = 0
    collective: bool = False
    """See `WorkerExit.collective`."""


@dataclass(frozen=True)
class WorkerHung:
    """A worker has been in one section for longer than its limit (`limits.py`)."""

    kind: ClassVar[str] = "worker_hung"
    host: str
    rank: int
    epoch: int
    section: str
    step: int
    seconds: float
    limit: float
    stopped: bool = False
    """Its process is stopped (SIGSTOP, a debugger)."""


@dataclass(frozen=True)
class HostLost:
    """An agent's lease has ended: its host is gone, cut off, or stopped. Or it is there again, as a new one."""

    kind: ClassVar[str] = "host_lost"
    host: str
    epoch: int
    seconds: float
    """Since the last heartbeat."""
    anew: bool = False
    """It was started again, without its worker and without its memory."""


@dataclass(frozen=True)
class AgentRefused:
    """An agent would not do what it was told (start a worker, serve its slots), or was not let in."""

    kind: ClassVar[str] = "agent_refused"
    host: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class PhaseExpired:
    """A state of the coordinator took longer than its deadline."""

    kind: ClassVar[str] = "phase_expired"
    epoch: int
    state: str
    """FORMING, RESTORING, WARMING, ..."""
    seconds: float
    missing: tuple[str, ...] = ()
    """Hosts that had not done their part."""


@dataclass(frozen=True)
class ShardRejected:
    """A shard that was to be restored is not what its digest says; the restore has no other copy at hand."""

    kind: ClassVar[str] = "shard_rejected"
    host: str
    epoch: int
    tier: str
    step: int
    path: str
    shard: str
    reason: str


@dataclass(frozen=True)
class EpochHostLost:
    """The process of JAX's coordination service ended; JAX then aborts every worker of the epoch."""

    kind: ClassVar[str] = "epoch_host_lost"
    host: str
    epoch: int
    exit_code: int | None = None
    signal: int | None = None


Evidence = (
    WorkerExit | WorkerError | WorkerHung | HostLost | AgentRefused | PhaseExpired | ShardRejected | EpochHostLost
)

KINDS: Mapping[str, type[Any]] = types.MappingProxyType({kind.kind: kind for kind in typing.get_args(Evidence)})


def to_json(evidence: Evidence) -> dict[str, Any]:
    """`kind` and the fields, as JSON holds them. Long texts keep their end."""
    fields = {field.name: getattr(evidence, field.name) for field in dataclasses.fields(evidence)}
    return {"kind": evidence.kind} | {name: _plain(value) for name, value in fields.items()}


def from_json(data: Any) -> Evidence:
    """What `to_json` gave. Trusts nothing: raises EvidenceError on another kind, another field or another type."""
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise EvidenceError(f"evidence is a JSON object with a 'kind', not {_short(data)}")
    kind = KINDS.get(data["kind"])
    if kind is None:
        raise EvidenceError(f"unknown kind of evidence {_short(data['kind'])}; known are {', '.join(KINDS)}")
    wanted = {field.name: field for field in dataclasses.fields(kind)}
    given = {name: value for name, value in data.items() if name != "kind"}
    if foreign := sorted(str(name) for name in given if name not in wanted):
        raise EvidenceError(f"{kind.kind} has no field {_short(foreign[0])}; it has {', '.join(wanted)}")
    required = [name for name, field in wanted.items() if field.default is dataclasses.MISSING]
    if absent := [name for name in required if name not in given]:
        raise EvidenceError(f"{kind.kind} lacks {', '.join(absent)}; an agent of another version?")
    hints = typing.get_type_hints(kind)
    values = {name: _read(kind.kind, name, value, hints[name]) for name, value in given.items()}
    if values.get("section", START) not in SECTIONS:
        raise EvidenceError(f"{kind.kind}.section is one of {', '.join(SECTIONS)}, not {_short(values['section'])}")
    if kind is WorkerExit and (values.get("exit_code") is None) == (values.get("signal") is None):
        raise EvidenceError("worker_exit has either an exit_code or a signal, and not both")
    evidence: Evidence = kind(**values)
    return evidence


def hosts_of(evidence: Evidence) -> tuple[str, ...]:
    """The hosts that it speaks of, whether or not they are to blame."""
    return evidence.missing if isinstance(evidence, PhaseExpired) else (evidence.host,)


def traceback_of(evidence: Evidence) -> str:
    """The Python traceback that came with it, or an empty string."""
    return evidence.traceback if isinstance(evidence, WorkerExit | WorkerError) else ""


def fingerprint(evidence: Evidence) -> str:
    """The same for the same failure on any host, in any epoch, with other addresses and numbers in its text.

    What happened, where in the program, and after how many updates: a bug that strikes at step 50 has the same
    fingerprint each time it does.
    """
    match evidence:
        case WorkerExit() if evidence.ended_by is not None and not evidence.error_class:
            return f"signal {signal_name(evidence.ended_by)} in {evidence.section} at step {evidence.step}"
        case WorkerExit() if not evidence.error_class:
            return f"exit code {evidence.exit_code} in {evidence.section} at step {evidence.step}"
        case WorkerExit() | WorkerError():
            # A worker that reports an exception and one that ends by it tell of the same failure.
            text = normalised(evidence.error_text)
            return f"{evidence.error_class}: {text} in {evidence.section} at step {evidence.step}"
        case WorkerHung():
            return f"hung in {evidence.section} at step {evidence.step}"
        case HostLost():
            return f"host {evidence.host} lost"
        case AgentRefused():
            return f"agent of {evidence.host} refused: {normalised(evidence.reason)}"
        case PhaseExpired():
            return f"{evidence.state} took too long"
        case ShardRejected():
            return f"{evidence.tier} shard {evidence.path} {evidence.shard} of step {evidence.step}: rejected"
        case EpochHostLost():
            return "epoch host lost"


def normalised(text: str) -> str:
    """A text without what differs from one occurrence to the next: addresses, numbers, folders, white space."""
    text = re.sub(r"0[xX][0-9a-fA-F]+", "#", text[-TEXT_LIMIT:])
    text = re.sub(r"(?:/[\w.+-]+)+/", "", text)
    text = re.sub(r"\b[0-9a-fA-F]{8,}\b", "#", text)
    text = re.sub(r"\d+(?:\.\d+)?", "#", text)
    return " ".join(text.split())[:500]


def signal_name(number: int) -> str:
    """SIGKILL for 9; the number where the system has no name for it."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return str(number)


def sentence(evidence: Evidence) -> str:
    """One line for people."""
    match evidence:
        case WorkerExit() | WorkerError() if evidence.error_class:
            first = (evidence.error_text.strip().splitlines() or [""])[0]
            return f"worker of {evidence.host} raised {evidence.error_class} in {_where(evidence)}: {first}"
        case WorkerExit() if evidence.ended_by is not None:
            return f"worker of {evidence.host} was ended by {signal_name(evidence.ended_by)} in {_where(evidence)}"
        case WorkerExit():
            return f"worker of {evidence.host} ended with exit code {evidence.exit_code} in {_where(evidence)}"
        case WorkerError():
            return f"worker of {evidence.host} failed in {_where(evidence)}: {evidence.error_text}"
        case WorkerHung():
            limit = f"{evidence.seconds:.1f} s, limit {evidence.limit:.1f} s"
            how = "is stopped" if evidence.stopped else "hangs"
            return f"worker of {evidence.host} {how} in {_where(evidence)} ({limit})"
        case HostLost() if evidence.anew:
            return f"{evidence.host} was lost and started anew, without its worker and its memory"
        case HostLost():
            return f"{evidence.host} is lost: no heartbeat for {evidence.seconds:.1f} s"
        case AgentRefused():
            return f"the agent of {evidence.host} refused: {evidence.reason}"
        case PhaseExpired():
            who = f"; missing: {', '.join(evidence.missing)}" if evidence.missing else ""
            return f"{evidence.state} took longer than {evidence.seconds:.1f} s{who}"
        case ShardRejected():
            what = f"{evidence.path} {evidence.shard} of step {evidence.step}"
            return f"{evidence.tier} shard {what} on {evidence.host} is damaged: {evidence.reason}"
        case EpochHostLost():
            return f"the coordination service of epoch {evidence.epoch} on {evidence.host} ended"


def _where(evidence: WorkerExit | WorkerError | WorkerHung) -> str:
    return f"{evidence.section} after {evidence.step} updates"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value[-TEXT_LIMIT:] if isinstance(value, str) else value


def _read(kind: str, name: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it."""
    if hint == tuple[str, ...]:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise EvidenceError(f"{kind}.{name} is a list of names, not {_short(value)}")
    allowed = typing.get_args(hint) or (hint,)
    if float in allowed and type(value) is int:
        value = float(value)
    # type() and not isinstance: True is no exit code.
    if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
        words = " or ".join("null" if a is types.NoneType else a.__name__ for a in allowed)
        raise EvidenceError(f"{kind}.{name} is {words}, not {_short(value)}")
    return value[-TEXT_LIMIT:] if isinstance(value, str) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
