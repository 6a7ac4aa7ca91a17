"""A supervised run on this machine for tests, benches and chaos: started, watched, hurt, and never left behind.

It runs `jaxscale launch` as a user would and looks only at what a user can see: the run directory and the processes.
Read next: `../supervisor/launch.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxscale.supervisor.process_stat import PARENT, children_of, living_stat_of
from jaxscale.track.jsonl import backwards, read_metrics
from jaxscale.track.lines import decode

POLL_SECONDS = 0.01
END_SECONDS = 30.0


class ClusterFailed(AssertionError):
    """The run did not get where it should; the message has its last events and what it printed."""


class RunningCluster:
    """A `jaxscale launch` under way."""

    def __init__(self, process: subprocess.Popen[bytes], run: Path, output: Path) -> None:
        self.process, self.run, self._output = process, run, output

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self._output.read_text(errors="replace")

    def events(self, kind: str | None = None, epoch: int | None = None) -> list[dict[str, Any]]:
        """Lines of events.jsonl, of this kind and epoch where given."""
        path = self.run / "events.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last one may be half written
                found.append(decode(line))
        return [e for e in found if kind in (None, e["kind"]) and epoch in (None, e["epoch"])]

    def metrics(self) -> list[dict[str, Any]]:
        """The committed line of each step, in order."""
        return read_metrics(self.run / "metrics.jsonl")

    def last_line(self) -> dict[str, Any]:
        """The newest line of metrics.jsonl; {} before there is one."""
        return next(backwards(self.run / "metrics.jsonl", limit=1 << 16), {})

    @property
    def epoch(self) -> int:
        """Of the newest metrics line; 0 before there is one."""
        return int(self.last_line().get("epoch", 0))

    def wait_for_step(self, step: int, epoch: int = 0, seconds: float = 120) -> dict[str, Any]:
        """The first line seen with at least this step and epoch. Raises ClusterFailed."""

        def there() -> dict[str, Any] | None:
            line = self.last_line()
            return line if line and line["step"] >= step and line["epoch"] >= epoch else None

        return self.wait_for(there, f"step {step} in epoch {epoch} or later", seconds)

    def wait_for_event(self, kind: str, seconds: float = 60, **fields: Any) -> dict[str, Any]:
        """The first event of this kind with these fields. Raises ClusterFailed."""

        def there() -> dict[str, Any] | None:
            found = [e for e in self.events(kind) if all(e.get(k) == v for k, v in fields.items())]
            return found[0] if found else None

        return self.wait_for(there, f"event {kind} {fields}", seconds)

    def wait_for[Value](self, look: Callable[[], Value | None], what: str, seconds: float = 60) -> Value:
        """What `look` gives once it is not None. Raises ClusterFailed after `seconds`, or when the run ends before."""
        deadline = time.monotonic() + seconds
        while True:
            value = look()
            if value is not None:
                return value
            if self._is_over():
                raise ClusterFailed(f"the run ended before {what}\n{self._story()}")
            if time.monotonic() > deadline:
                raise ClusterFailed(f"no {what} within {seconds:g} s\n{self._story()}")
            time.sleep(POLL_SECONDS)

    def worker(self, rank: int) -> tuple[str, int]:
        """Host and pid of the worker of this rank in the newest epoch that has started all of its workers."""
        started = self.events("worker_started")
        newest = max(e["epoch"] for e in started)
        found = next(e for e in started if e["epoch"] == newest and e["rank"] == rank)
        return found["host"], found["pid"]

    def agent(self, host: str) -> int:
        """Pid of the agent of a host."""
        return int([e for e in self.events("agent_started") if e["host"] == host][-1]["pid"])

    def coordinator(self) -> int:
        """Pid of the coordinator."""
        return int(self.events("coordinator_started")[-1]["pid"])

    def members(self) -> int:
        """Workers of the newest epoch."""
        started = self.events("worker_started")
        newest = max(e["epoch"] for e in started)
        return sum(e["epoch"] == newest for e in started)

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl, replayed steps as often as they were trained."""
        found = []
        path = self.run / "metrics.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                found.append(decode(line))
        return found

    def late_writes(self) -> list[dict[str, Any]]:
        """Lines of metrics and sealed steps of an epoch after the first line of a later one: its writer had to end."""
        found: list[dict[str, Any]] = []
        highest = 0
        written = [*self.lines(), *self.events("sealed")]
        for line in sorted(written, key=lambda one: float(one["time"])):
            if line["epoch"] < highest:
                found.append(line)
            elif "loss" in line:
                highest = line["epoch"]
        return found

    def memory(self, host: str) -> Path:
        """A host's folder in shared memory."""
        words = Path(f"/proc/{self.agent(host)}/cmdline").read_text().split("\0")
        return Path(words[words.index("--shared-memory") + 1]) / host

    def zygote(self, host: str) -> int:
        """Pid of a host's zygote."""
        return next(pid for pid in children_of(self.agent(host)) if "jaxscale.supervisor.zygote" in _words(pid)[2:4])

    def service(self) -> tuple[str, int]:
        """Host and pid of the newest epoch's coordination service: a child of the agent that is no worker."""
        host, worker = self.worker(0)
        # A forked process has its zygote's command line, but leads a session of its own.
        forked = [pid for pid in children_of(self.agent(host)) if os.getsid(pid) == pid and pid != worker]
        return host, forked[-1]

    def kill_host(self, host: str) -> None:
        """Ends every process of a host at once, as a power cut does; its memory is lost with it."""
        agent = self.agent(host)
        memory = self.memory(host)
        os.kill(agent, signal.SIGSTOP)  # it must not see its children die
        for child in children_of(agent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        os.kill(agent, signal.SIGKILL)
        shutil.rmtree(memory, ignore_errors=True)

    def finish(self, seconds: float = 180) -> int:
        """Waits for the end and returns the exit code. Raises ClusterFailed when it does not come."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise ClusterFailed(f"the run did not end within {seconds:g} s\n{self._story()}") from error

    def _is_over(self) -> bool:
        return self.process.poll() is not None

    def _story(self) -> str:
        events = "\n".join(str(e)[:300] for e in self.events()[-25:])
        return f"{events}\n--- printed\n{self.output[-4000:]}"


@contextlib.contextmanager
def launched(
    recipe: Path, run: Path, *overrides: object, environment: dict[str, str] | None = None
) -> Iterator[RunningCluster]:
    """Starts `jaxscale launch recipe --run.dir run overrides` and yields it; on the way out nothing of it is left."""
    command: Sequence[str] = [sys.executable, "-m", "jaxscale", "launch", str(recipe), "--run.dir", str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    output = run.parent / f"{run.name}.out"
    with open(output, "wb") as stream:
        process = subprocess.Popen(
            [*command, *map(str, overrides)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **(environment or {})},
        )
    cluster = RunningCluster(process, run, output)
    try:
        yield cluster
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
        _end_all(run)
        if process.poll() is None:
            process.kill()
        process.wait()


def _end_all(run: Path) -> None:
    """Kills whatever is left of a run, and frees its shared memory, which its launcher did not live to do."""
    memory = set()
    for _ in range(20):  # one that is not dead yet may have started another meanwhile
        found = left_behind(run)
        for pid in found:
            with contextlib.suppress(OSError):
                memory.add(_after("--shared-memory", _words(pid)))
                os.kill(pid, signal.SIGKILL)
        if not found:
            break
        time.sleep(POLL_SECONDS * 5)
    for folder in memory - {""}:
        shutil.rmtree(folder, ignore_errors=True)


def left_behind(run: Path) -> list[int]:
    """Processes of a run that still live: those with its directory in their command line, and its agents.

    Agents name the job alone. It is known from a coordinator, which names both, or from an agent that has a child of
    the run.
    """
    words: dict[int, list[str]] = {}
    parents: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                pid = int(entry.name)
                if (stat := living_stat_of(pid)) is not None:
                    words[pid] = _words(pid)
                    parents |= {int(stat[PARENT])} if str(run) in words[pid] else set()
    named = {pid for pid, found in words.items() if str(run) in found}
    jobs = {_after("--job", words[pid]) for pid in named | parents if pid in words} - {""}
    return sorted(pid for pid, found in words.items() if pid in named or _after("--job", found) in jobs)


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")


def _after(flag: str, words: Sequence[str]) -> str:
    """The value of a flag in a command line; empty where it has none."""
    return next((value for name, value in itertools.pairwise(words) if name == flag), "")
