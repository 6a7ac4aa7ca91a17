"""The processes that an agent owns: its zygote, and the workers and epoch hosts that the zygote forked for it.

Forked processes become children of the agent (it is a subreaper), so it gets their exit codes; each is watched through
a pidfd, which cannot mean another process after a pid was used again. Linux only. Read next: `agent.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxscale.supervisor.memory_kills import MemoryKills
from jaxscale.supervisor.process_stat import FLAGS, stat_of
from jaxscale.supervisor.zygote import MESSAGE_BYTES, ForkError

PR_SET_CHILD_SUBREAPER = 36
PF_EXITING = 0x4
FORK_SECONDS = 10.0
END_SECONDS = 1.0
"""A process that has closed its socket is gone by then, and how it ended is known."""
IMPORT_SECONDS = 120.0
MEMORY_SECONDS = 5.0
"""Between two looks at how many processes the kernel has killed for memory."""


class ZygoteFailed(RuntimeError):
    """The zygote could not import the recipe, or died. The message has its own words."""


class ZygoteDied(ZygoteFailed):
    """It ended or fell silent without a word of its own: killed, or out of time. Another one may well succeed."""


@dataclass(frozen=True)
class Exit:
    """How a process ended: by itself with a code, or by a signal."""

    code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"ended by {signal.Signals(self.signal).name}"
        return f"exit code {self.code}" if self.code is not None else "ended, nobody knows how"


def become_subreaper() -> None:
    """Makes orphans below this process its children. Raises OSError where the kernel does not know how."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this kernel has no subreapers; the supervisor needs Linux 3.4 or newer")


class Child:
    """A forked process, watched through its pidfd."""

    def __init__(self, pid: int, epoch: int, ended: Callable[[Child, Exit], None]) -> None:
        """`ended` is called once, in the event loop. Raises ProcessLookupError if the process is gone already."""
        self.pid, self.epoch = pid, epoch
        self.exit: Exit | None = None
        self.was_killed = False
        """Whether `kill` found it alive."""
        self.lacked_memory = False
        """Whether the kernel killed it because memory ran out."""
        self._ended = ended
        self._file = os.pidfd_open(pid)
        self._memory_kills = MemoryKills(pid)
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._file, self._reap)
        self._timer = self._loop.call_later(MEMORY_SECONDS, self._look)

    def send(self, number: signal.Signals) -> None:
        """A signal to the process itself; nothing happens if it has ended."""
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._file, number)

    def kill(self) -> None:
        """SIGKILL to the process and all that it started in its session."""
        if self.exit is None:
            # Readable: it is dead already, only not reaped. Whoever did that, it was not us.
            is_dead = select.select([self._file], [], [], 0)[0] or is_dying(self.pid)
            self.was_killed = self.was_killed or not is_dead
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.send(signal.SIGKILL)

    def how(self) -> dict[str, Any]:
        """How it ended, for the coordinator."""
        assert self.exit is not None
        code, number = self.exit.code, self.exit.signal
        return {"code": code, "signal": number, "fenced": self.was_killed, "out_of_memory": self.lacked_memory}

    async def wait(self) -> Exit:
        await self._over.wait()
        assert self.exit is not None
        return self.exit

    def _look(self) -> None:
        self._memory_kills.look()
        self._timer = self._loop.call_later(MEMORY_SECONDS, self._look)

    def _reap(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._file)
        try:
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self.exit = Exit(code, None) if code >= 0 else Exit(None, -code)
        except ChildProcessError:  # adopted from an agent that died: its exit code went to somebody else
            self.exit = Exit(None, None)
        self.lacked_memory = self.exit.signal == signal.SIGKILL and self._memory_kills.happened()
        os.close(self._file)
        self._over.set()
        self._ended(self, self.exit)


def is_dying(pid: int) -> bool:
    """Whether a process has been ended and only takes its time: its sockets close, which its peers notice, long before
    a large process is gone.
    """
    try:
        flags = int(stat_of(pid)[FLAGS])
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, IndexError, ValueError):
        return True
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
    return bool(flags & PF_EXITING) or any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)


class Zygote:
    """Starts the zygote process and asks it for forks."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """`arguments`: recipe and overrides, as for `jaxscale train`. `log`: where its output and its workers' goes."""
        self._arguments, self._log, self._environment = list(arguments), log, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = asyncio.Lock()
        self.ready = False
        self._imports = False
        """`start` waits for it."""
        self._is_closed = False
        self._was_told = False
        self._exit: Exit | None = None
        """How it ended, where that was not by `close`."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def exit(self) -> Exit | None:
        """How it ended by itself or by somebody else; None while it runs, and where `close` ended it."""
        if self._exit is None and not self._is_closed and self._process is not None:
            code = self._process.poll()
            if code is not None:
                self._exit = Exit(code, None) if code >= 0 else Exit(None, -code)
        return self._exit

    def has_died(self) -> bool:
        """Whether it has ended, or stopped answering, before or after it was ready. Says so once, and closes it."""
        is_well = self.exit is None and (self.ready or self._imports)
        if self._process is None or self._was_told or is_well:
            return False
        self._was_told = True
        self.close()
        return True

    async def start(self) -> None:
        """Returns when it has imported everything.

        Raises ZygoteFailed with its words where it raised, ZygoteDied where it ended without any, and OSError where
        there is no process to be had.
        """
        self._imports = True
        try:
            await self._start()
        finally:
            self._imports = False

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        # One thread of OpenBLAS: a process with more cannot fork safely.
        variables = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **self._environment}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open(self._log, "ab") as log:
            command = [sys.executable, "-m", "jaxscale.supervisor.zygote", str(theirs.fileno()), *self._arguments]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                pass_fds=[theirs.fileno()],
            )
        try:
            said = await self._receive(IMPORT_SECONDS)
        except ZygoteDied as error:
            raise ZygoteDied(await self._last_words(str(error))) from error
        if "ready" not in said:
            raise ZygoteFailed(said.get("traceback") or said.get("error") or f"it ended; its words are in {self._log}")
        self.ready = True

    async def _last_words(self, otherwise: str) -> str:
        """How it ended while it imported; `otherwise` where it still runs."""
        deadline = time.monotonic() + END_SECONDS
        while self.exit is None and self._socket is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self.exit is None:
            return otherwise
        return f"the zygote was still importing: {self.exit}; what it printed is in {self._log}"

    async def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer. Raises ForkError where it refuses and ZygoteFailed where it is not there."""
        async with self._lock:
            if not self.ready or self._socket is None:
                raise ZygoteFailed("the zygote is not ready")
            loop = asyncio.get_running_loop()
            try:
                await loop.sock_sendall(self._socket, json.dumps(message).encode())
            except OSError as error:
                self.ready = False
                raise ZygoteDied(f"the zygote is gone ({error})") from error
            said = await self._receive(FORK_SECONDS)
        if "error" in said:
            raise ForkError(said["error"])
        return said

    def close(self) -> None:
        """Ends the zygote; what it forked lives on."""
        self.ready = False
        if self.exit is None:
            self._is_closed = True  # from here on its end is ours
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()

    async def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        try:
            data = await asyncio.wait_for(loop.sock_recv(self._socket, MESSAGE_BYTES), seconds)
        except TimeoutError as error:
            self.ready = False
            raise ZygoteDied(f"the zygote did not answer in {seconds:g} s") from error
        except OSError as error:
            self.ready = False
            raise ZygoteDied(f"the zygote is gone ({error})") from error
        if not data:
            self.ready = False
            raise ZygoteDied(f"the zygote ended; its words are in {self._log}")
        message: dict[str, Any] = json.loads(data)
        return message
