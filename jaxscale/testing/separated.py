"""A supervised run whose hosts can be cut off from one another, started piece by piece as on a real cluster.

A coordinator and an agent per host, each by its own command, in its host's namespace or behind a proxy; the file system
is shared, as a run directory is. Read next: `namespaces.py`, `cluster.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.testing.cluster import RunningCluster, left_behind
from jaxscale.testing.namespaces import Network, network
from jaxscale.testing.proxies import ProxiedNetwork, proxied

END_SECONDS = 20.0
Flags = Callable[[str], Sequence[object]]


class SeparatedCluster(RunningCluster):
    """`process` is the first coordinator; the run is over when the agents are."""

    def __init__(
        self,
        run: Path,
        output: Path,
        net: Network | ProxiedNetwork,
        shape: tuple[int, int],
        seat: int = 0,
        flags: Flags = lambda _: (),
    ) -> None:
        """`seat`: index of the first coordinator's place in the network. `flags`: more flags of a host's agent."""
        self._flags = flags
        self.net, self._shape, self._agents, self._seat = net, shape, {}, seat
        self._folder = Path(tempfile.mkdtemp(prefix="jaxscale-separated-", dir="/dev/shm"))
        write_token(self._folder / "token", new_token())
        self._environment = {**os.environ, **child_environment(self._folder / "token")}
        self._stream = open(output, "wb")  # noqa: SIM115 - closed in `end`
        super().__init__(None, run, output)  # type: ignore[arg-type]  # the coordinator is started next

    _agents: dict[str, subprocess.Popen[bytes]]

    @property
    def hosts(self) -> list[str]:
        return [f"host-{i}" for i in range(self._shape[0] * self._shape[1])]

    def start(self, recipe: Path, overrides: Sequence[object]) -> None:
        """The coordinator lives in the namespace of host-0, or in one of its own."""
        slices, per_slice = self._shape
        self._address = f"{self.net.address(self._seat)}:{self.net.port}"
        shape = ("--slices", slices, "--hosts-per-slice", per_slice, "--devices-per-host", 1, "--run.dir", self.run)
        self.process = self._start(self._seat, "coordinator", recipe, "--listen", self._address, *shape, *overrides)
        for index, host in enumerate(self.hosts):
            self.start_agent(host, index)

    def start_agent(self, host: str, index: int) -> None:
        place = ("--slice", index // self._shape[1], "--devices", 1, "--listen", self.net.address(index))
        where = ("--coordinator", self.net.way(index, self._address), "--shared-memory", self._folder)
        self._agents[host] = self._start(index, "agent", "--host", host, *place, *where, *self._flags(host))

    def end_agent(self, host: str) -> None:
        """Kills the agent of a host that takes no part in the run, and forgets it."""
        agent = self._agents.pop(host)
        agent.kill()
        agent.wait(END_SECONDS)

    def ended(self) -> list[int | None]:
        """Exit codes of the agents."""
        return [agent.poll() for agent in self._agents.values()]

    def finish(self, seconds: float = 180) -> int:
        """Waits until every agent has ended; the largest of their exit codes."""
        deadline = time.monotonic() + seconds
        while None in self.ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert None not in self.ended(), f"agents still run after {seconds:g} s\n{self._story()}"
        return max(code or 0 for code in self.ended())

    def end(self) -> None:
        """Leaves no process and no file."""
        for process in (*self._agents.values(), self.process):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(END_SECONDS)
        for pid in {*left_behind(self.run), *self.net.processes()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_over(self) -> bool:
        return None not in self.ended()

    def _start(self, index: int, *words: object) -> subprocess.Popen[bytes]:
        command = [*self.net.inside(index), sys.executable, "-m", "jaxscale", *map(str, words)]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._stream,
            stderr=self._stream,
            env=self._environment,
            start_new_session=True,
        )


@contextlib.contextmanager
def separated(
    recipe: Path,
    run: Path,
    *overrides: object,
    shape: tuple[int, int] = (2, 2),
    by_proxy: bool = False,
    apart: bool = False,
    flags: Flags = lambda _: (),
) -> Iterator[SeparatedCluster]:
    """Starts slices x hosts in namespaces of their own and yields the cluster; nothing is left on the way out.

    by_proxy: without namespaces, and with proxies on the ways to the coordinator alone. apart: the coordinator has a
    place of its own, behind those of the hosts. flags: more flags of the agent of a host, by its name.
    """
    hosts = shape[0] * shape[1]
    run.parent.mkdir(parents=True, exist_ok=True)
    with (proxied if by_proxy else network)(hosts + apart) as net:
        seat = hosts if apart else 0
        cluster = SeparatedCluster(run, run.parent / f"{run.name}.out", net, shape, seat, flags)
        try:
            cluster.start(recipe, overrides)
            yield cluster
        finally:
            cluster.end()
