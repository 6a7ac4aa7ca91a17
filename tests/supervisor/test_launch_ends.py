"""How `jaxscale launch` ends a run, and what it starts again: a stop is never lost, and nothing is left behind."""

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jaxscale.cli import main
from jaxscale.recipe import load_recipe
from jaxscale.supervisor.descendants import children_of, end_with_descendants
from jaxscale.supervisor.launch import Cluster, ClusterShape
from jaxscale.supervisor.revivals import RESTART_RETRY, RESTARTS, WELL_SECONDS, Revivals
from jaxscale.supervisor.stop_request import AGAIN_SECONDS, ANSWER_SECONDS, ONE_SECONDS, StopRequest
from jaxscale.supervisor.sweep import YOUNG_SECONDS, make_folder, sweep
from jaxscale.testing.cluster import launched, left_behind

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
JOB = "0123456789abcdef"
pytestmark = pytest.mark.usefixtures("one_cache")


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_for(look, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return found


# A stop that is asked for


class Asked:
    """A stop request with a clock of its own, and a coordinator that answers when it is told to."""

    def __init__(self):
        self.now, self.answers, self.times = 0.0, False, []
        self.stop = StopRequest(self.ask, lambda: self.now)

    def ask(self, reason):
        assert reason == "SIGTERM"
        self.times.append(self.now)
        return self.answers

    def run(self, seconds):
        for _ in range(round(seconds / 0.05)):
            self.stop.poll()
            self.now += 0.05


def test_a_stop_is_asked_for_until_a_coordinator_has_taken_it():
    asked = Asked()
    asked.run(1)
    assert not asked.times, "nobody wants it"
    asked.stop.signalled(signal.SIGTERM)
    asked.run(5)
    assert 8 <= len(asked.times) <= 10
    assert min(b - a for a, b in zip(asked.times, asked.times[1:], strict=False)) >= AGAIN_SECONDS - 0.01
    asked.answers = True
    asked.run(ANSWER_SECONDS * 2)
    assert len(asked.times) <= 11, "it has been taken"
    assert not asked.stop.impatience
    asked.times.clear()
    asked.stop.forget_answer()
    asked.run(5)
    assert len(asked.times) == 1, "another coordinator may not know"


def test_a_second_signal_ends_everything_but_the_same_one_twice_does_not():
    asked = Asked()
    asked.answers = True
    asked.stop.signalled(signal.SIGTERM)
    asked.now += ONE_SECONDS / 2
    asked.stop.signalled(signal.SIGTERM)
    asked.run(3)
    assert not asked.stop.impatience
    asked.stop.signalled(signal.SIGINT)
    assert "SIGINT" in asked.stop.impatience


def test_nobody_waits_for_ever_for_a_coordinator():
    asked = Asked()
    asked.stop.signalled(signal.SIGTERM)
    asked.run(ANSWER_SECONDS - 1)
    assert not asked.stop.impatience
    asked.run(2)
    assert "no coordinator answered" in asked.stop.impatience


# What is started again, and when


def test_what_dies_without_a_new_step_comes_back_later_and_later_and_then_no_more():
    revivals = Revivals()
    waits = []
    for _ in range(RESTARTS + 1):
        revivals.began("x", 0.0, 7)
        waits.append(revivals.ended("x", -9, 1.0, 7))
    assert waits[:7] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, RESTART_RETRY.longest_seconds]
    assert waits[RESTARTS - 1 :] == [RESTART_RETRY.longest_seconds, None]
    assert revivals.ended("y", -9, 1.0, 7) == 0.0, "each has its own count"


def test_a_new_step_pays_for_the_restarts_before():
    revivals = Revivals()
    for step in range(5 * RESTARTS):
        revivals.began("x", step, step)
        assert revivals.ended("x", -9, step + 0.5, step + 1) == 0.0


def test_what_ends_by_its_own_fault_waits_even_while_others_train():
    revivals = Revivals()
    waits = []
    for step, code in enumerate((1, -signal.SIGSEGV, 1, 2, 1, 1, 1)):
        revivals.began("x", step, step)
        waits.append(revivals.ended("x", code, step + 0.5, step + 1))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, RESTART_RETRY.longest_seconds, RESTART_RETRY.longest_seconds]
    revivals.began("x", 10.0, 10)
    assert revivals.ended("x", 1, 10.0 + WELL_SECONDS, 11) == 0.5, "it had started well"


STUB = """\
#!{python}
import json, os, signal, sys, time
from pathlib import Path

folder, name = Path({folder!r}), sys.argv[3]
if name == "agent":
    name = sys.argv[sys.argv.index("--host") + 1]
with open(folder / f"{{name}}.starts", "a") as file:
    file.write("x")
starts = (folder / f"{{name}}.starts").stat().st_size
if starts > 5:
    os._exit(97)  # it is started again and again

def wait_for(look):
    while not look():
        time.sleep(0.01)

def starts_of(other):
    try:
        return (folder / f"{{other}}.starts").stat().st_size
    except OSError:
        return 0

def say(to, reason):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / ".lock").write_text(f"pid {{os.getpid()}} on vm\\n")
    event = {{"time": 1.0, "epoch": 1, "kind": "state", "from": "RUNNING", "to": to, "reason": reason}}
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(event) + "\\n")

signal.signal(signal.SIGALRM, lambda *_: os._exit(98))  # never left behind, and no death that is made up for
signal.alarm(30)
{body}
"""


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """Runs a cluster of two hosts whose processes are this script; returns exit code and starts of each process."""

    def run(body, restart_after=0.0):
        stub = tmp_path / "stub"
        text = STUB.format(python=sys.executable, folder=str(tmp_path), body=textwrap.dedent(body))
        stub.write_text(text)
        stub.chmod(0o755)
        recipe = load_recipe(NANO)
        config = recipe.config
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "run")))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(stub))
            cluster = Cluster(recipe, config, [], ClusterShape(1, 2, 1, 0, restart_after))
            code = cluster.run()
        assert not cluster.folder.exists()
        return code, {path.stem: path.stat().st_size for path in tmp_path.glob("*.starts")}

    return run


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_signal_after_the_end_of_a_run_that_was_to_stop_does_not_change_its_exit_code(monkeypatch, is_asked):
    """The interpreter takes some milliseconds to end, with the handlers that it finds."""
    recipe = load_recipe(NANO)
    cluster = Cluster(recipe, recipe.config, [], ClusterShape(1, 1, 1, 0, 0.0))

    def stopped(_):
        if is_asked:
            signal.raise_signal(signal.SIGTERM)
        return 75

    monkeypatch.setattr(Cluster, "_run", stopped)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert cluster.run() == 75
        for number, handler in before.items():
            assert signal.getsignal(number) is (signal.SIG_IGN if is_asked else handler)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_agent_that_ends_by_an_exception_is_started_again(stubbed, capsys):
    code, starts = stubbed(
        """
        if name == "coordinator":
            wait_for(lambda: starts_of("host-0") == 3)
            (folder / "over").touch()
            say("DONE", "every step is trained and saved")
        elif name == "host-0" and starts < 3:
            sys.exit(1)
        else:
            wait_for((folder / "over").exists)
        """
    )
    assert (code, starts) == (0, {"coordinator": 1, "host-0": 3, "host-1": 1})
    said = "the agent of host-0 ended by itself (exit code 1; what it printed may say why): started again in"
    assert capsys.readouterr().out.count(said) == 2


def test_agents_that_leave_with_the_runs_exit_code_stay_away(stubbed):
    code, starts = stubbed(
        """
        if name == "coordinator":
            wait_for(lambda: starts_of("host-0") and starts_of("host-1"))
            say("ESCALATED", "same error twice")
            (folder / "over").touch()
            time.sleep(1.0)
            sys.exit(1)
        else:
            wait_for((folder / "over").exists)
            sys.exit(1)
        """
    )
    assert (code, starts) == (1, {"coordinator": 1, "host-0": 1, "host-1": 1})


def test_a_coordinator_that_dies_after_its_last_word_is_not_started_again(stubbed):
    code, starts = stubbed(
        """
        if name == "coordinator":
            wait_for(lambda: starts_of("host-0") and starts_of("host-1"))
            say("DONE", "stopped (SIGTERM) and saved at step 5")
            (folder / "over").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for((folder / "over").exists)
        sys.exit(75)
        """
    )
    assert (code, starts) == (75, {"coordinator": 1, "host-0": 1, "host-1": 1})


def test_a_host_that_is_lost_for_good_stays_away(stubbed):
    code, starts = stubbed(
        """
        if name == "coordinator":
            wait_for((folder / "dead").exists)
            time.sleep(0.8)
            say("DONE", "every step is trained and saved")
        elif name == "host-0":
            (folder / "dead").touch()
            sys.exit(1)
        """,
        restart_after=-1.0,
    )
    assert (code, starts["host-0"]) == (0, 1)


# What is ended


def test_what_has_a_session_of_its_own_is_ended_with_its_stopped_parent(tmp_path):
    """A parent that is stopped, a child that leads a session, and one that forks all the time."""
    forks = (
        "import os, time\nwhile True:\n  if os.fork() == 0: os.setsid(); time.sleep(60); os._exit(0)\n  time.sleep(.01)"
    )
    tree = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
subprocess.Popen([sys.executable, "-c", {forks!r}], start_new_session=True)
time.sleep(60)
"""
    mark = {**os.environ, "TEST_LAUNCH_ENDS": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", tree], env=mark, start_new_session=True)

    def all_of_it():
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and str(tmp_path).encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return [pid for pid in found if pid != os.getpid() and is_alive(pid)]

    try:
        wait_for(lambda: len(children_of(parent.pid)) == 2 and len(all_of_it()) > 6)
        os.kill(parent.pid, signal.SIGSTOP)
        end_with_descendants([parent.pid])
        assert parent.wait(5) == -signal.SIGKILL
        assert all_of_it() == []
    finally:
        while left := all_of_it():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        parent.wait()


def test_ending_what_has_ended_is_no_error():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    end_with_descendants([child.pid])
    child.wait()
    end_with_descendants([child.pid])


# What earlier launchers left


def left_by(root, name, age=2 * YOUNG_SECONDS):
    folder = root / name
    folder.mkdir()
    (folder / "token").write_text("secret")
    os.utime(folder, (time.time() - age, time.time() - age))
    return folder


def test_folders_of_dead_jobs_are_swept_and_no_others(tmp_path):
    dead = left_by(tmp_path, f"jaxscale-{JOB}-dead")
    kept = [
        left_by(tmp_path, f"jaxscale-{JOB}-young", age=YOUNG_SECONDS / 4),
        left_by(tmp_path, "jaxscale-agents-x"),
        left_by(tmp_path, f"other-{JOB}-x"),
        left_by(tmp_path, f"jaxscale-{'1' * 16}-worker"),
        left_by(tmp_path, f"jaxscale-{'2' * 16}-agent"),
    ]
    (tmp_path / f"jaxscale-{JOB}-link").symlink_to(kept[1])
    locked, lock = make_folder("3" * 16, tmp_path)
    os.utime(locked, (0, 0))
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    alive = [
        subprocess.Popen(sleep, env={**os.environ, "JAXSCALE_TOKEN_FILE": str(kept[3] / "token")}),
        subprocess.Popen([*sleep, "--job", "2" * 16]),
    ]
    try:
        assert sweep(tmp_path) == [dead]
        assert not dead.exists()
        assert all((folder / "token").exists() for folder in kept)
        assert locked.exists()
    finally:
        os.close(lock)
        for process in alive:
            process.kill()
            process.wait()
    assert set(sweep(tmp_path)) == {kept[3], kept[4], locked}, "now they are dead too"


# Real runs


@pytest.fixture
def long_run(tmp_path):
    """A run of one host that does not end by itself."""
    flags = ("--slices", 1, "--hosts-per-slice", 1, "--steps", 100_000, "--memory.every", 5)
    with launched(NANO, tmp_path / "run", *flags) as run:
        yield run


def test_a_stop_during_the_start_is_not_lost(long_run):
    process = long_run.process
    wait_for(lambda: children_of(process.pid))  # the handlers are there, and nobody listens yet
    process.send_signal(signal.SIGTERM)
    assert long_run.finish(60) == 75
    assert not long_run.metrics()
    assert not left_behind(long_run.run)


def test_a_stop_while_the_coordinator_is_started_again_is_not_lost(long_run):
    long_run.wait_for_step(3)
    memory = long_run.memory("host-0").parent
    descriptor = os.open(memory, os.O_RDONLY)
    os.kill(long_run.coordinator(), signal.SIGKILL)
    long_run.process.send_signal(signal.SIGTERM)
    with pytest.raises(BlockingIOError):  # or a later launcher might sweep it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    assert long_run.finish(60) == 75
    last = long_run.output.strip().splitlines()[-1]
    assert last.startswith(f"stopped after step {long_run.last_line()['step']:,} of 100,000"), long_run.output[-2000:]
    assert last.endswith("it is saved: the same command again goes on from there")
    assert not memory.exists()


def test_a_second_signal_ends_also_what_a_stopped_agent_started_and_calls_nothing_saved(long_run):
    long_run.wait_for_step(3)
    agent, memory = long_run.agent("host-0"), long_run.memory("host-0").parent
    below = children_of(agent)
    assert len(below) >= 2, "a zygote and a worker"
    os.kill(agent, signal.SIGSTOP)
    os.kill(long_run.coordinator(), signal.SIGSTOP)
    for _ in range(20):  # two are enough, unless the machine is so busy that they come together
        long_run.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            long_run.process.wait(ONE_SECONDS * 2)
            break
    assert long_run.finish(30) == 75
    assert [pid for pid in below if is_alive(pid)] == []
    assert not memory.exists()
    lines = long_run.output.strip().splitlines()
    assert any(line.startswith("everything is ended at once (a second signal, SIGTERM)") for line in lines)
    assert lines[-1].endswith("nothing is saved: the same command again starts from step 0")


def test_the_first_word_of_a_flag_names_the_flag(capsys):
    assert main(["launch", str(NANO), "--hosts", "2"]) == 2
    assert "did you mean --hosts-per-slice?" in capsys.readouterr().err
