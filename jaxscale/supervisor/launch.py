"""An emulated cluster on this machine: one coordinator, an agent per host, real processes, real sockets.

It starts what died again and decides nothing: everything that is decided, the coordinator decides. Read next:
`coordinator.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxscale.config import Config
from jaxscale.recipe import Recipe
from jaxscale.supervisor import rpc
from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.supervisor.show import Show
from jaxscale.supervisor.states import DEPOSED
from jaxscale.supervisor.zygote import free_port

POLL_SECONDS = 0.05
LEAVE_SECONDS = 10.0
TAKEOVER_SECONDS = 15.0
"""Hosts start a coordinator only where this process, which starts it again at once, is gone too."""
RESTARTS = 20
"""How often one process is started again before the cluster is given up."""


@dataclass(frozen=True)
class ClusterShape:
    """How many hosts, in which slices, with how many emulated devices."""

    slices: int
    hosts_per_slice: int
    devices_per_host: int
    spares: int
    restart_after: float
    """Seconds after which a host that died comes back, with nothing in its memory; negative: never."""


class Cluster:
    """Starts the processes of a supervised run, watches them, and ends them."""

    def __init__(self, recipe: Recipe, config: Config, overrides: Sequence[str], shape: ClusterShape) -> None:
        self._recipe, self._config, self._overrides, self._shape = recipe, config, list(overrides), shape
        self._job = secrets.token_hex(8)
        self._token = new_token()
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts: dict[str, int] = {}
        self._died: dict[str, float] = {}
        self._asked = ""

    def run(self) -> int:
        """Returns the exit code of the run. Leaves no process and no file in shared memory."""
        self._address = f"127.0.0.1:{free_port()}"
        self.folder = Path(tempfile.mkdtemp(prefix=f"jaxscale-{self._job}-", dir=_shared_memory()))
        token = self.folder / "token"
        write_token(token, self._token)
        self._environment = {**os.environ, **child_environment(token)}
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._show = Show(self._config, self._shape)
        try:
            self._start_coordinator()
            for name, _ in self._hosts():
                self._start_agent(name)
            return self._watch()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._end()

    def _hosts(self) -> list[tuple[str, int]]:
        shape = self._shape
        members = [(f"host-{i}", i // shape.hosts_per_slice) for i in range(shape.slices * shape.hosts_per_slice)]
        return members + [(f"spare-{i}", -1) for i in range(shape.spares)]

    def _start_coordinator(self) -> None:
        shape = self._shape
        self._coordinator = self._start(
            "coordinator",
            str(self._recipe.path),
            *("--listen", self._address, "--job", self._job),
            *("--slices", str(shape.slices), "--hosts-per-slice", str(shape.hosts_per_slice)),
            *("--devices-per-host", str(shape.devices_per_host), "--spares", str(shape.spares)),
            *self._overrides,
        )

    def _start_agent(self, name: str) -> None:
        self._agents[name] = self._start(
            "agent",
            *("--coordinator", self._address, "--job", self._job, "--host", name),
            *("--slice", str(dict(self._hosts())[name]), "--devices", str(self._shape.devices_per_host)),
            *("--shared-memory", str(self.folder), "--takeover-after", str(TAKEOVER_SECONDS)),
        )

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "jaxscale", *arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=self._environment, start_new_session=True)

    def _watch(self) -> int:
        assert self._coordinator is not None
        while True:
            if self._asked:
                self._pass_on()
            code = self._coordinator.poll()
            if code == DEPOSED:
                codes = [agent.poll() for agent in self._agents.values()]
                if all(code is not None for code in codes):
                    return max(code or 0 for code in codes)
                code = None
            if code is not None and code >= 0:
                self._show.finish(self._coordinator.pid, code)
                return code
            self._show.poll(self._coordinator.pid)
            if code is not None:
                if not self._may_restart("coordinator"):
                    last = signal.Signals(-code).name
                    text = f"error: the coordinator died {RESTARTS + 1} times, the last time by {last}"
                    print(text, file=sys.stderr)
                    return 1
                self._start_coordinator()
            for name in [name for name, agent in self._agents.items() if (agent.poll() or 0) < 0]:
                died = self._died.setdefault(name, time.monotonic())
                # Where the host's memory is still there only the agent died, and the next one takes over at once.
                wait = 0.0 if (self.folder / name).exists() else self._shape.restart_after
                if 0 <= wait <= time.monotonic() - died and self._may_restart(name):
                    del self._died[name]
                    self._start_agent(name)
            time.sleep(POLL_SECONDS)

    def _may_restart(self, name: str) -> bool:
        self._restarts[name] = self._restarts.get(name, 0) + 1
        return self._restarts[name] <= RESTARTS

    def _on_signal(self, number: int, _frame: object) -> None:
        self._asked = signal.Signals(number).name

    def _pass_on(self) -> None:
        reason, self._asked = self._asked, ""
        with contextlib.suppress(rpc.Unreachable, rpc.Refused):
            question = {"ask": "drain", "reason": reason}
            asyncio.run(rpc.ask(self._address, self._token, question))

    def _end(self) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        processes = [p for p in (self._coordinator, *self._agents.values()) if p is not None]
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _shared_memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
