"""Real worlds of several processes on this machine, for tests: started together, collected, and never left behind.

Each process gets `ADDRESS,N,I` (what `--distributed` takes), emulated CPU devices, and its own two log files.
Read next: `world.py`, which such a process joins.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PLACE = "{distributed}"
"""Replaced in a command's arguments by the process's ADDRESS,N,I."""
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    index: int
    exit_code: int
    """Negative: the signal that ended it, also when it was killed here."""
    stdout: str
    stderr: str
    killed: bool
    """Whether it was killed here, for the timeout or because another process had failed."""


class WorldFailed(AssertionError):
    """A process of the world did not end with 0. The message has every process's exit code and last lines."""


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the kernel chose and gives to nobody else meanwhile; the coordination service can still listen on it.

    The socket stays bound but does not listen, and both sides share the port by SO_REUSEPORT, which gRPC sets.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


@contextlib.contextmanager
def started_world(
    command: str | Sequence[str],
    processes: int,
    devices_per_process: int = 1,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts the processes of one world and yields them; on the way out every one that still runs is killed, by pid.

    `command`: Python source, run with ADDRESS,N,I as `sys.argv[1]`; or arguments for `python` in which `{distributed}`
    stands for it. `folder`: where the logs `I.out` and `I.err` go; default: a temporary folder that is removed.
    """
    arguments = ["-c", command, PLACE] if isinstance(command, str) else list(command)
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
        **(environment or {}),
    }
    members: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        logs = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = stack.enter_context(reserved_port())
        try:
            for index in range(processes):
                place = f"127.0.0.1:{port},{processes},{index}"
                with open(logs / f"{index}.out", "wb") as out, open(logs / f"{index}.err", "wb") as err:
                    members.append(
                        subprocess.Popen(
                            [sys.executable, *(argument.replace(PLACE, place) for argument in arguments)],
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=err,
                            env=variables,
                            start_new_session=True,
                        )
                    )
            yield members
        finally:
            for member in members:
                kill(member)


def run_world(
    command: str | Sequence[str],
    processes: int,
    devices_per_process: int = 1,
    timeout: float = 240.0,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
) -> list[Outcome]:
    """Runs a world to its end and returns how each process ended, in order; see `started_world` for `command`.

    When one fails the others have GRACE_SECONDS to notice before they are killed; after `timeout` seconds all are.
    Raises WorldFailed unless all end with 0, or `check` is False.
    """
    with tempfile.TemporaryDirectory() as name:
        logs = Path(name)
        with started_world(command, processes, devices_per_process, environment, logs) as members:
            killed = _wait(members, timeout)
        outcomes = [
            Outcome(
                index=index,
                exit_code=member.returncode,
                stdout=(logs / f"{index}.out").read_text(errors="replace"),
                stderr=(logs / f"{index}.err").read_text(errors="replace"),
                killed=index in killed,
            )
            for index, member in enumerate(members)
        ]
    if check and any(outcome.exit_code for outcome in outcomes):
        raise WorldFailed("\n".join(_report(outcome) for outcome in outcomes))
    return outcomes


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process started here together with what it started in its session, and reaps it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(members: Sequence[subprocess.Popen[bytes]], timeout: float) -> set[int]:
    """Waits for all to end; returns the indices of those that had to be killed."""
    deadline = time.monotonic() + timeout
    failed = False
    while any(member.poll() is None for member in members):
        if not failed and any(member.poll() for member in members):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            late = {index for index, member in enumerate(members) if member.poll() is None}
            for index in late:
                kill(members[index])
            return late
        time.sleep(POLL_SECONDS)
    return set()


def _report(outcome: Outcome) -> str:
    end = f"process {outcome.index}: exit code {outcome.exit_code}{' (killed)' if outcome.killed else ''}"
    return f"--- {end}\n{outcome.stdout[-2000:]}\n{outcome.stderr[-4000:]}"
