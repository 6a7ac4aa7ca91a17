"""An emulated cluster on this machine: one coordinator, an agent per host, real processes, real sockets.

It starts what died again (`revivals.py`), passes a stop on (`stop_request.py`) and decides nothing: everything that is
decided, the coordinator decides. Read next: `coordinator.py`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxscale.config import Config
from jaxscale.recipe import Recipe
from jaxscale.supervisor import rpc
from jaxscale.supervisor.descendants import end_with_descendants
from jaxscale.supervisor.estate import read_estate
from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.supervisor.revivals import RESTARTS, Revivals
from jaxscale.supervisor.show import Show
from jaxscale.supervisor.states import DEPOSED
from jaxscale.supervisor.stop_request import StopRequest
from jaxscale.supervisor.sweep import make_folder, processes_of, shared_memory, sweep
from jaxscale.supervisor.zygote import free_port
from jaxscale.train.protocols import ExitReason

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
LEAVE_SECONDS = 10.0
TAKEOVER_SECONDS = 15.0
"""Hosts start a coordinator only where this process, which starts it again at once, is gone too."""
ASK_SECONDS = 1.0
"""How long an answer to a stop is waited for; nothing else is watched meanwhile."""
COORDINATOR = "coordinator"
STOPPED = ExitReason.STOPPED.value
TOLD_TO_END = (ExitReason.COMPLETED.value, STOPPED)
"""Exit codes that an agent has only because its coordinator said so; 1 may also be an exception of its own."""


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
        self._revivals = Revivals()
        self._due: dict[str, float] = {}
        """Name of a process that has ended -> when it is to be started again; infinity: never."""
        self._stop = StopRequest(self._pass_on)
        self._is_told = False
        """Whether agents whose coordinator is elsewhere were told of the stop."""

    def run(self) -> int:
        """Returns the exit code of the run. Leaves no process and no file in shared memory."""
        self._address = f"{LOOPBACK}:{free_port(LOOPBACK)}"
        before = {number: signal.signal(number, self._stop.signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            sweep(shared_memory())
            self.folder, self._lock = make_folder(self._job, shared_memory())
            try:
                return self._run()
            finally:
                self._end(LEAVE_SECONDS)
                shutil.rmtree(self.folder, ignore_errors=True)
                os.close(self._lock)
        finally:
            for number, handler in before.items():
                # Who asked twice may ask a third time: all has ended by now, and the exit code is to say how.
                signal.signal(number, signal.SIG_IGN if self._stop.reason else handler)

    def _run(self) -> int:
        token = self.folder / "token"
        write_token(token, self._token)
        self._environment = {**os.environ, **child_environment(token)}
        self._show = Show(self._config, self._shape)
        self._start_coordinator()
        for name, _ in self._hosts():
            self._start_agent(name)
        return self._watch()

    def _hosts(self) -> list[tuple[str, int]]:
        shape = self._shape
        members = [(f"host-{i}", i // shape.hosts_per_slice) for i in range(shape.slices * shape.hosts_per_slice)]
        return members + [(f"spare-{i}", -1) for i in range(shape.spares)]

    def _start_coordinator(self) -> None:
        shape = self._shape
        self._coordinator = self._start(
            COORDINATOR,
            COORDINATOR,
            str(self._recipe.path),
            *("--listen", self._address, "--job", self._job),
            *("--slices", str(shape.slices), "--hosts-per-slice", str(shape.hosts_per_slice)),
            *("--devices-per-host", str(shape.devices_per_host), "--spares", str(shape.spares)),
            *self._overrides,
        )

    def _start_agent(self, name: str) -> None:
        self._agents[name] = self._start(
            name,
            "agent",
            *("--coordinator", self._address, "--job", self._job, "--host", name),
            *("--slice", str(dict(self._hosts())[name]), "--devices", str(self._shape.devices_per_host)),
            *("--shared-memory", str(self.folder), "--takeover-after", str(TAKEOVER_SECONDS)),
        )

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        self._revivals.began(name, time.monotonic(), self._show.step)
        self._due.pop(name, None)
        command = [sys.executable, "-m", "jaxscale", *arguments]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,
            pass_fds=(self._lock,),  # a later launcher sees by it that the folder is in use
        )

    def _watch(self) -> int:
        while True:
            assert self._coordinator is not None
            self._stop.poll()
            if self._stop.impatience:
                return self._end_at_once()
            code = self._coordinator.poll()
            self._show.poll(self._coordinator.pid)
            if code == DEPOSED:
                self._tell_agents()
            elif code is not None and code >= 0:
                self._show.finish(self._coordinator.pid, code)
                return code
            if code is not None and (said := self._run_is_over(code)) is not None:
                self._show.finish(self._coordinator.pid, said)
                return said
            if code is not None and code < 0 and not self._revive_coordinator(code):
                return 1
            self._revive_agents()
            time.sleep(POLL_SECONDS)

    def _run_is_over(self, code: int) -> int | None:
        """The run's exit code, where no coordinator of ours lives to say it. `code`: how ours ended."""
        if code != DEPOSED:  # killed, perhaps after it had said that all is over
            return self._show.verdict
        codes = {name: agent.poll() for name, agent in self._agents.items()}
        if any(code is None or not (self._was_told(code) or self._is_away(name)) for name, code in codes.items()):
            return None
        return max((code for code in codes.values() if code is not None and self._was_told(code)), default=1)

    def _was_told(self, code: int) -> bool:
        """Whether an agent's exit code is that of the run: it ended because the coordinator said so."""
        return code in TOLD_TO_END or (code >= 0 and self._show.verdict is not None)

    def _is_away(self, name: str) -> bool:
        """Whether an agent that has ended is not started again."""
        return self._due.get(name, 0.0) == float("inf")

    def _revive_coordinator(self, code: int) -> bool:
        """Starts the coordinator again when it is time; whether there is still hope."""
        self._stop.forget_answer()
        if COORDINATOR not in self._due:
            wait = self._revivals.ended(COORDINATOR, code, time.monotonic(), self._show.step)
            if wait is None:
                print(
                    f"error: the coordinator died {RESTARTS + 1} times without a new step in between, the last time by "
                    f"{_how(code)}; what it printed above, and events.jsonl in the run directory, may say why",
                    file=sys.stderr,
                )
                return False
            self._due[COORDINATOR] = time.monotonic() + wait
        if time.monotonic() >= self._due[COORDINATOR]:
            self._start_coordinator()
        return True

    def _revive_agents(self) -> None:
        for name, agent in self._agents.items():
            if (code := agent.poll()) is None or self._show.verdict is not None or self._was_told(code):
                continue
            if name not in self._due:
                self._due[name] = time.monotonic() + self._wait_before(name, code)
            if time.monotonic() >= self._due[name]:
                self._start_agent(name)

    def _wait_before(self, name: str, code: int) -> float:
        """Seconds until an agent that has ended is started again."""
        wait = self._revivals.ended(name, code, time.monotonic(), self._show.step)
        # Where the host's memory is still there only the agent died, and the next one takes over at once.
        lost = 0.0 if (self.folder / name).exists() else self._shape.restart_after
        if wait is None:
            self._show.say(
                f"the agent of {name} ended {RESTARTS + 1} times without a new step in between: it stays away"
            )
            return float("inf")
        if lost < 0:
            return float("inf")
        if code >= 0:
            how = f"exit code {code}; what it printed may say why"
            self._show.say(f"the agent of {name} ended by itself ({how}): started again in {max(wait, lost):g} s")
        return max(wait, lost)

    # Stopping

    def _pass_on(self, reason: str) -> bool:
        """Tells the coordinator to stop the run; whether it has heard."""
        question = {"ask": "drain", "reason": reason}
        try:
            answer = asyncio.run(rpc.ask(self._address, self._token, question, ASK_SECONDS))
        except (rpc.Unreachable, rpc.Refused, rpc.NameTaken, ValueError):  # it starts, is dead, or hangs
            return False
        return answer.get("ok") is True

    def _tell_agents(self) -> None:
        """The coordinator lives on another host, where this process cannot ask it: every host is told to end."""
        if self._stop.reason and not self._is_told:
            self._is_told = True
            for agent in self._agents.values():
                if agent.poll() is None:
                    agent.send_signal(signal.SIGTERM)

    def _end_at_once(self) -> int:
        assert self._coordinator is not None
        why = self._stop.impatience
        print(f"everything is ended at once ({why}): what the workers had in memory is lost", file=sys.stderr)
        self._end(0.0)
        self._show.finish(self._coordinator.pid, STOPPED, why)
        return STOPPED

    def _end(self, patience: float) -> None:
        """Gives all processes some seconds to leave, then ends them and everything that they started."""
        processes = {COORDINATOR: self._coordinator, **self._agents}
        running = [process for process in processes.values() if process is not None]
        deadline = time.monotonic() + patience
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            if self._stop.impatience:
                break
            time.sleep(POLL_SECONDS)
        pids = [process.pid for process in running if process.poll() is None]
        for name in self._agents:  # what an agent left that died and was not started again
            estate = read_estate(self.folder / name)
            pids += [heir.pid for heir in (estate.worker, estate.service) if heir is not None and heir.is_alive()]
        end_with_descendants([*pids, *processes_of(self.folder, self._job)])
        for process in running:
            process.wait()


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
