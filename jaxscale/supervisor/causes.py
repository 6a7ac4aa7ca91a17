"""The name of a failure's cause, by which the policy's rows and budgets know it. Pure.

    memory       the process or the device ran out of it        signal    ended by a signal
    data         a data worker died, or the loader hangs        hang      no progress elsewhere
    collective   a collective failed and nobody died            error     an exception, or an exit code
    host         a host is lost                                 refused   an agent would not
    epoch host   JAX's coordination service died                shard     a copy is damaged
    ended early  left as if done or asked to stop               phase X   the state X took too long

Read next: `policy.py`.
"""

from __future__ import annotations

import re

from jaxscale.supervisor.evidence import (
    START,
    AgentRefused,
    EpochHostLost,
    Evidence,
    HostLost,
    PhaseExpired,
    ShardRejected,
    WorkerError,
    WorkerExit,
    WorkerHung,
)
from jaxscale.train.protocols import ExitReason

MEMORY_TEXT = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|cannot allocate memory|bad_alloc|ENOMEM|OOM[- ]?kill", re.IGNORECASE
)

DATA_WORKER_TEXT = re.compile(
    r"worker.*\b(died|dead|exited|killed|terminated|crashed|gone|lost)\b|broken pipe|connection reset|timed out",
    re.IGNORECASE | re.DOTALL,
)

PASSING_ERRORS = frozenset(
    {
        "OSError",
        "IOError",
        "EOFError",
        "BrokenPipeError",
        "ConnectionError",
        "ConnectionResetError",
        "ConnectionAbortedError",
        "ConnectionRefusedError",
        "InterruptedError",
        "TimeoutError",
        "BrokenProcessPool",
    }
)
"""Raised while data is read, they speak of a process or a file system and not of the data."""

CANNOT_START = frozenset(
    {
        "ImportError",
        "ModuleNotFoundError",
        "SyntaxError",
        "IndentationError",
        "TabError",
        "ConfigError",
        "MeshError",
        "MeshFileError",
        "AuditError",
        "PlanError",
        "GenerateError",
        "StateMismatch",
        "DifferentStart",
        "UnsupportedAttention",
        "UnsupportedContext",
        "StatusError",
        "RunDirectoryError",
        "StoreError",
        "PlaceError",
        "PromotionRefused",
        "RunOwned",
        "LocationsUnknown",
        "UsageError",
    }
)
"""Before the first step these are the same at every attempt: ConfigError and all that derive from it (tested)."""

BEFORE_STEPS = frozenset({START, "restore", "compile"})

USAGE_EXIT_CODE = 2
"""Of Python and of `jaxscale`, for a command line that cannot be understood."""

CRASHES = frozenset({4, 5, 6, 7, 8, 11, 31})
"""Signals that a process raises against itself: ILL, TRAP, ABRT, BUS, FPE, SEGV, SYS. Others come from outside."""


def cause_of(evidence: Evidence) -> str:
    """One of the names above; every evidence has one."""
    match evidence:
        case HostLost():
            return "host"
        case AgentRefused():
            return "refused"
        case PhaseExpired():
            return f"phase {evidence.state}"
        case ShardRejected():
            return "shard"
        case EpochHostLost():
            return "epoch host"
        case WorkerHung():
            # A stopped process waits for nothing: it is stopped wherever it happens to be.
            return "data" if evidence.section == "data" and not evidence.stopped else "hang"
        case WorkerExit() | WorkerError():
            return _cause_of_worker(evidence)


def is_code_that_cannot_start(evidence: Evidence) -> bool:
    """Whether no attempt can go better: an import, syntax, config or usage error before the first step."""
    if not isinstance(evidence, WorkerExit | WorkerError) or evidence.section not in BEFORE_STEPS:
        return False
    usage = isinstance(evidence, WorkerExit) and evidence.exit_code == USAGE_EXIT_CODE and evidence.section == START
    return usage or evidence.error_class.rpartition(".")[2] in CANNOT_START


def is_crash(evidence: Evidence) -> bool:
    """Whether native code ended its own process."""
    return isinstance(evidence, WorkerExit) and evidence.ended_by in CRASHES


def _cause_of_worker(evidence: WorkerExit | WorkerError) -> str:
    name = evidence.error_class.rpartition(".")[2]
    killed = isinstance(evidence, WorkerExit) and evidence.out_of_memory
    if killed or name == "MemoryError" or MEMORY_TEXT.search(evidence.error_text):
        return "memory"
    if evidence.collective:
        return "collective"
    if evidence.section == "data" and (name in PASSING_ERRORS or DATA_WORKER_TEXT.search(evidence.error_text)):
        return "data"
    if isinstance(evidence, WorkerExit) and not name:
        if evidence.ended_by is not None:
            return "signal"
        if evidence.exit_code in (ExitReason.COMPLETED.value, ExitReason.STOPPED.value):
            return "ended early"
    return "error"
