"""Hosts that are not as they should be, as real processes: little memory, foreign files, taken names, old versions."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from jaxscale.checkpoint.slot import ArrayInfo, SlotWriter
from jaxscale.supervisor.job_token import child_environment, new_token, write_token
from jaxscale.supervisor.zygote import free_port
from jaxscale.testing.cluster import RunningCluster, launched, left_behind

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
pytestmark = pytest.mark.usefixtures("one_cache")


class Pieces(RunningCluster):
    """A coordinator and agents, each started by its own command as on a real cluster."""

    def __init__(self, folder, *overrides):
        self.folder, self._all = Path(tempfile.mkdtemp(prefix="jaxscale-pieces-", dir="/dev/shm")), []
        write_token(self.folder / "token", new_token())
        self._environment = {**os.environ, **child_environment(self.folder / "token")}
        self._address = f"127.0.0.1:{free_port('127.0.0.1')}"
        run = folder / "run"
        place = ("--listen", self._address, "--devices-per-host", 1, "--run.dir", run)
        process = self.start(folder / "coordinator.out", "-m", "jaxscale", "coordinator", NANO, *place, *overrides)
        super().__init__(process, run, folder / "coordinator.out")

    def start(self, output, *words):
        with open(output, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=self._environment,
                start_new_session=True,
            )
        self._all.append(process)
        return process

    def agent_of(self, host, shared_memory=None, output=None, program=("-m", "jaxscale")):
        """Starts an agent."""
        place = ("--coordinator", self._address, "--host", host, "--devices", 1, "--takeover-after", 30)
        memory = ("--shared-memory", shared_memory or self.folder)
        return self.start(output or self.run.parent / f"{host}.out", *program, "agent", *place, *memory)

    def end(self):
        for process in self._all:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in left_behind(self.run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def pieces(folder, *overrides):
    """Starts a coordinator; nothing of it and of the agents is left on the way out."""
    cluster = Pieces(folder, *overrides)
    try:
        yield cluster
    finally:
        cluster.end()


@contextlib.contextmanager
def small_memory(folder, size):
    """A file system in memory with so little room."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "jaxscale-test", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# Memory


@pytest.mark.slow
def test_a_host_without_room_for_its_slots_trains_on_and_an_alarm_says_so(tmp_path):
    flags = ("--memory.every", 2, "--steps", 20, "--checkpoint.every", 0)
    with small_memory(tmp_path / "small", "1m") as small, pieces(tmp_path, *flags) as run:
        run.agent_of("host-0")
        run.agent_of("host-1", small)
        assert run.finish() == 0
        alarms = [e["detail"] for e in run.events("alarm") if e["what"] == "memory checkpoint failed"]
        assert [line["step"] for line in run.metrics()] == list(range(1, 21))
        assert not run.events("fault")
    assert len(alarms) == 1
    assert alarms[0].startswith("host-1, step 2: ")
    assert "/dev/shm" in alarms[0]


def whole_slot(path, job, host):
    """A slot that is whole, of a training that came further than the one of the test."""
    writer = SlotWriter(path, job, host, int(host[-1]), {"w": ArrayInfo((4,), "float32")}, [("w", ((0, 4),))])
    writer.begin(1, 1000)
    writer.view(0)[:] = 1
    writer.seal({"step": 1000})
    writer.close()


@pytest.mark.slow
def test_files_of_others_in_a_hosts_memory_are_never_loaded_and_disturb_nobody(tmp_path):
    flags = ("--memory.every", 2, "--steps", 30, "--checkpoint.every", 0)
    with pieces(tmp_path, *flags) as run:
        for host, other in (("host-0", "host-1"), ("host-1", "host-0")):
            own, copies = run.folder / host / "own", run.folder / host / "copies" / other
            for folder in (own, copies):
                folder.mkdir(mode=0o700, parents=True)
            whole_slot(own / "gen-0", "another", host)
            whole_slot(own / "gen-5", "another", host)  # lies there to the end: only the first two are written
            (own / "gen-1").write_bytes(b"garbage" * 1000)
            whole_slot(copies / "gen-0", "another", other)
            whole_slot(copies / "gen-1", "job", other)
            os.truncate(copies / "gen-1", 5000)
            (copies / "gen-7").mkdir()
        run.agent_of("host-0")
        run.agent_of("host-1")
        run.wait_for_step(10)
        os.kill(run.worker(1)[1], signal.SIGKILL)
        assert run.finish() == 0
        (restored,) = run.events("restored")
        assert [line["step"] for line in run.metrics()] == list(range(1, 31))
        assert not run.events("rejected")
    assert restored["step"] > 0
    assert "durable" not in restored["sources"]


# Names, versions, ports


@pytest.mark.slow
def test_a_second_agent_of_one_name_gives_up_and_the_first_stays(tmp_path):
    with pieces(tmp_path) as run:
        first = run.agent_of("host-0")
        started = run.wait_for_event("agent_started", host="host-0")
        other = tmp_path / "other"
        second = run.agent_of("host-0", other, output=tmp_path / "second.out")
        assert second.wait(60) == 1
        said = (tmp_path / "second.out").read_text()
        assert "there is an agent called host-0 already" in said.splitlines()[-1]
        assert f"pid {started['pid']}" in said
        assert first.poll() is None
        assert {e["pid"] for e in run.events("agent_started")} == {first.pid}
        assert not list(other.glob("*"))


OLDER = """
import sys
from jaxscale.supervisor import rpc
rpc.VERSION -= 1
from jaxscale.cli import main
sys.exit(main())
"""


def test_an_agent_of_another_version_is_turned_away_with_both_numbers(tmp_path):
    with pieces(tmp_path) as run:
        agent = run.agent_of("host-0", program=("-c", OLDER))
        assert agent.wait(60) == 1
        last = (tmp_path / "host-0.out").read_text().strip().splitlines()[-1]
        assert "agent host-0 speaks version" in last
        assert "use one jaxscale" in last
        assert not run.events("agent_started")
        assert run.process.poll() is None


def test_a_port_that_is_taken_ends_the_coordinator_with_an_error_that_says_so(tmp_path):
    write_token(tmp_path / "token", new_token())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "jaxscale", "coordinator", NANO, "--listen", address]
        said = subprocess.run(
            [*map(str, command), "--run.dir", str(tmp_path / "run")],
            env={**os.environ, **child_environment(tmp_path / "token")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert said.returncode == 1
    last = said.stderr.strip().splitlines()[-1]
    assert f"cannot listen on {address}" in last
    assert "choose another port" in last


# Recipes


def test_a_recipe_that_raises_on_the_hosts_alone_ends_the_run_with_its_traceback_last(tmp_path):
    recipe = tmp_path / "raises.py"
    recipe.write_text(
        textwrap.dedent(
            f"""
            import importlib.util
            import sys

            if any("zygote" in word for word in sys.orig_argv):
                raise LookupError("this host lacks something")
            spec = importlib.util.spec_from_file_location("nano", {str(NANO)!r})
            nano = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(nano)
            config = nano.config
            """
        )
    )
    with launched(recipe, tmp_path / "run") as run:
        assert run.finish(60) == 1
        lines = run.output.strip().splitlines()
        assert not run.events("worker_started")
    assert lines[-1] == "LookupError: this host lacks something"
    assert any("the recipe cannot be imported on host-" in line for line in lines)
    assert not left_behind(tmp_path / "run")


RAISES_IN_LOSS = """
import dataclasses
from dataclasses import dataclass

from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import load_recipe

nano = load_recipe({nano!r}).config


class BadTask:
    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, params, batch, key):
        raise ArithmeticError("this loss has a bug")


@dataclass(frozen=True)
class BadConfig(TransformerConfig):
    def task(self, config):
        return BadTask(super().task(config))


def config():
    fields = {{field.name: getattr(nano.model, field.name) for field in dataclasses.fields(nano.model)}}
    return dataclasses.replace(nano, name="bad", model=BadConfig(**fields))
"""


def test_a_recipe_that_raises_in_its_loss_ends_the_run_with_its_traceback_last(tmp_path):
    """On every host, when the step is traced. It might be a host's memory, so it is tried once more, and no longer."""
    recipe = tmp_path / "bad.py"
    recipe.write_text(RAISES_IN_LOSS.format(nano=str(NANO)))
    with launched(recipe, tmp_path / "run", "--slices", 2, "--hosts-per-slice", 1) as run:
        assert run.finish(90) == 1
        lines = run.output.strip().splitlines()
        faults = run.events("fault")
        assert not run.metrics()
    assert [fault["class"] for fault in faults] == ["recoverable", "fatal"]
    what = r"raised ArithmeticError in compile after 0 updates: this loss has a bug"
    said = [line for line in lines if line.startswith("fault: ")]
    assert len(said) == 2
    for line in said:
        assert re.match(rf"fault: (worker of host-[01]|each worker of host-[01], host-[01]) {what} \(", line)
        assert not re.search(r"(host-\d), \1", line), "what a worker said of its end is said once"
    assert sum(line.startswith("same error twice: ") for line in lines) == 1
    assert lines.count("Traceback (most recent call last):") == 1
    assert lines[-2:] == ['    raise ArithmeticError("this loss has a bug")', "ArithmeticError: this loss has a bug"]
    assert not left_behind(tmp_path / "run")
