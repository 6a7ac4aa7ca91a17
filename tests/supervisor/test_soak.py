"""scripts/soak goes on where it was interrupted; an undisturbed run serves many seeds; what a preemption must be."""

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxscale.chaos import run as chaos_run
from jaxscale.chaos.faults import listens
from jaxscale.chaos.run import WrongReference, undisturbed
from jaxscale.chaos.schedule import Strike, schedule, steps_for
from jaxscale.testing.cluster import RunningCluster, _end_all, left_behind
from jaxscale.track.lines import encode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("soak_script", str(ROOT / "scripts/soak"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("soak_script", loader))
    loader.exec_module(module)
    return module


class Runner:
    """Passes every seed but those in `bad`, and is interrupted at the seeds in `stops`."""

    def __init__(self, script, options, bad=(), stops=()):
        self.script, self.options, self.bad, self.stops = script, options, bad, stops
        self.ran = []

    def __call__(self, seed, commit):
        del commit
        if seed in self.stops:
            raise self.script.Interrupted("SIGINT")
        self.ran.append(seed)
        strikes = self.script.strikes_of(self.options, seed)
        kept = strikes[: len(strikes) // 2] if seed in self.bad else strikes
        recoveries = [{"kind": s.kind, "whom": "w", "step": 9, "seconds": 1.0 + seed, "replayed": 0} for s in kept]
        problems = ["no new step"] if seed in self.bad else []
        return {"recoveries": recoveries, "problems": problems, "passed": not problems}


@pytest.fixture
def soak(script, tmp_path):
    """Runs a soak of 4 seeds with a fake runner; returns the runner, the results, and what was told."""

    def soak(*flags, commit="c1", bad=(), stops=()):
        words = ("--results", str(tmp_path / "r.jsonl"), "--seeds", "4", "--faults", "6", "--kinds", "kill", "hang")
        options = script.parse([*words, *flags])
        runner, told = Runner(script, options, bad, stops), []
        try:
            done = script.soak(options, runner, lambda: commit, told.append)
        except script.Interrupted:
            done = None
        return types.SimpleNamespace(ran=runner.ran, done=done, told=told, options=options)

    return soak


def test_an_interrupted_soak_goes_on_after_the_last_finished_seed(soak, script):
    first = soak(stops=(2,))
    assert (first.ran, first.done) == ([0, 1], None)
    again = soak()
    assert again.ran == [2, 3]
    assert again.told[0] == "2 of 4 seeds passed before and are not run again"
    assert script.has_passed(again.options, again.done)
    assert soak().ran == []


def test_a_seed_that_failed_is_run_again_and_its_newest_result_counts(soak, script):
    first = soak(bad=(1,))
    assert first.ran == [0, 1, 2, 3]
    assert not script.has_passed(first.options, first.done)
    again = soak()
    assert again.ran == [1]
    assert script.has_passed(again.options, again.done)


def test_what_passed_on_another_commit_counts_only_where_it_is_asked_for(soak):
    soak(commit="c1")
    assert soak("--any-commit", commit="c2").ran == []
    assert soak(commit="c2").ran == [0, 1, 2, 3]


def test_with_uncommitted_changes_nothing_is_skipped(soak):
    soak(commit="c1-dirty")
    assert soak(commit="c1-dirty").ran == [0, 1, 2, 3]
    assert soak("--any-commit", commit="c1-dirty").ran == []


def test_results_of_other_faults_do_not_count(soak):
    soak()
    assert soak("--faults", "7").ran == [0, 1, 2, 3]
    assert soak("--kinds", "kill").ran == [0, 1, 2, 3]


def test_a_line_that_a_kill_left_half_written_is_run_again_and_harms_no_other(soak, script):
    done = soak(stops=(3,))
    path = done.options.results
    path.write_bytes(path.read_bytes()[:-40])  # seed 2 is half there
    assert soak().ran == [2, 3]
    assert [result["seed"] for result in script.read_results(path)] == [0, 1, 2, 3]


def test_each_line_says_commit_seed_kinds_recoveries_and_problems(soak, script):
    done = soak(bad=(3,))
    lines = script.read_results(done.options.results)
    assert [line["problems"] for line in lines] == [[], [], [], ["no new step"]]
    assert {(line["commit"], tuple(line["kinds"]), line["faults"]) for line in lines} == {("c1", ("kill", "hang"), 6)}
    assert [len(line["recoveries"]) for line in lines] == [6, 6, 6, 3]


def test_the_table_counts_faults_by_kind(soak, script):
    done = soak(bad=(3,))
    *kinds, total = script.rows(done.options, done.done)
    assert total == ("all", 24, 21, 3, 2.0, 4.0)
    assert [row[0] for row in kinds] == ["kill", "hang"]
    assert sum(row[1] for row in kinds) == 24
    assert sum(row[2] for row in kinds) == 21
    assert script.table(done.options, done.done).endswith("seed 3: no new step")


def test_wrong_losses_at_the_end_count_against_all_faults_of_the_seed(soak, script):
    done = soak()
    done.done[0] |= {"passed": False, "problems": ["the loss of step 9 is 1, not 2"]}
    assert script.rows(done.options, done.done)[-1][:4] == ("all", 24, 18, 6)
    assert not script.has_passed(done.options, done.done)


def test_a_missing_seed_is_no_success(soak, script):
    done = soak()
    del done.done[2]
    assert not script.has_passed(done.options, done.done)


def test_a_report_must_agree_with_the_exit_code(script):
    good = {"recoveries": [], "problems": [], "passed": True, "largest_difference": 0.0, "resized": False}
    assert script.report_of(0, f"noise\n{json.dumps(good)}\n", "")["passed"]
    assert not script.report_of(1, json.dumps(good), "")["passed"]
    crashed = script.report_of(1, "", "Traceback\nValueError: boom")
    assert (crashed["passed"], crashed["problems"][0][-4:]) == (False, "boom")


def test_two_soaks_do_not_share_a_results_file(tmp_path, script, capsys):
    import fcntl

    with open(tmp_path / "r.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert script.main(["--results", str(tmp_path / "r.jsonl")]) == 2
    assert "another soak" in capsys.readouterr().err


def test_an_interrupt_reaches_the_run_under_chaos_and_waits_for_its_end(tmp_path):
    """The child stands for `jaxscale chaos`: it says so when it has cleaned up."""
    # The file is closed by a statement: an interrupt while Python closes what nobody holds any more is swallowed.
    child = (
        "import sys,time\ntry:\n with open(sys.argv[1], 'w') as mark: mark.write('up')\n"
        " for _ in range(600): time.sleep(0.1)  # an interrupt just before a long one would not end it\n"
        "except KeyboardInterrupt:\n time.sleep(0.3)\n open(sys.argv[1], 'w').write('cleaned')\n"
    )
    mark = tmp_path / "mark"
    soak = (
        "import importlib.machinery as m, importlib.util as u, signal, sys\n"
        "l = m.SourceFileLoader('soak', sys.argv[1]); s = u.module_from_spec(u.spec_from_loader('soak', l))\n"
        "l.exec_module(s); signal.signal(signal.SIGTERM, s.interrupt)\n"
        "chaos = s.Chaos.__new__(s.Chaos); chaos.lock = open(sys.argv[4], 'w')\n"
        "try:\n chaos._run([sys.executable, '-c', sys.argv[2], sys.argv[3]])\n"
        "except s.Interrupted as name:\n print('interrupted by', name)\n"
    )
    words = [str(ROOT / "scripts/soak"), child, str(mark), str(tmp_path / "lock")]
    process = subprocess.Popen([sys.executable, "-c", soak, *words], stdout=subprocess.PIPE, text=True)
    try:
        while not (mark.exists() and mark.read_text()):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert output == "interrupted by SIGTERM\n"
    assert mark.read_text() == "cleaned"


# The undisturbed run


class Finished:
    def __init__(self, lines):
        self.lines, self.output = lines, ""

    def finish(self, seconds):
        del seconds
        return 0

    def metrics(self):
        return self.lines


@pytest.fixture
def trained(monkeypatch):
    """Runs that were trained, instead of real ones."""
    trained = []

    class Launched:
        def __init__(self, recipe, run, *overrides):
            del recipe
            trained.append(overrides)
            run.mkdir(parents=True)
            self.lines = [{"step": 1, "loss": 2.0, "epoch": 1}]
            (run / "metrics.jsonl").write_bytes(b"".join(encode(line) for line in self.lines))

        def __enter__(self):
            return Finished(self.lines)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(chaos_run, "launched", Launched)
    return trained


def test_an_undisturbed_run_is_trained_once_and_used_again(tmp_path, trained):
    recipe = tmp_path / "r.py"
    recipe.write_text("a")
    first = undisturbed(recipe, tmp_path / "ref", ("--steps", 3), lambda _: None)
    again = undisturbed(recipe, tmp_path / "ref", ("--steps", 3), lambda _: None)
    assert first == again == [{"step": 1, "loss": 2.0, "epoch": 1}]
    assert trained == [("--steps", 3)]


def test_an_undisturbed_run_of_something_else_is_refused(tmp_path, trained):
    recipe = tmp_path / "r.py"
    recipe.write_text("a")
    undisturbed(recipe, tmp_path / "ref", ("--steps", 3), lambda _: None)
    with pytest.raises(WrongReference, match="of another overrides"):
        undisturbed(recipe, tmp_path / "ref", ("--steps", 4), lambda _: None)
    recipe.write_text("b")
    with pytest.raises(WrongReference, match="of another recipe"):
        undisturbed(recipe, tmp_path / "ref", ("--steps", 3), lambda _: None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    with pytest.raises(WrongReference, match="no undisturbed run"):
        undisturbed(recipe, tmp_path / "mine", ("--steps", 3), lambda _: None)
    assert (tmp_path / "mine" / "thesis").exists()
    assert len(trained) == 1


def test_an_undisturbed_run_that_was_interrupted_is_trained_anew(tmp_path, trained):
    recipe = tmp_path / "r.py"
    recipe.write_text("a")
    (tmp_path / "ref" / "run").mkdir(parents=True)
    (tmp_path / "ref" / "run" / "half").touch()
    undisturbed(recipe, tmp_path / "ref", (), lambda _: None)
    assert not (tmp_path / "ref" / "run" / "half").exists()
    assert len(trained) == 1


def test_steps_are_enough_for_what_follows_each_fault():
    strikes = schedule(3, 20, ("kill", "preempt"), 5, 25)
    assert steps_for(strikes) > sum(strike.after_steps for strike in strikes) + 200
    assert steps_for([Strike("preempt", 9, 0)]) > steps_for([Strike("kill", 9, 0)])


# Preemption


def test_a_process_listens_once_it_has_a_handler():
    before = signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    try:
        assert not listens(os.getpid(), signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        assert listens(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not listens(2**22 + 1, signal.SIGUSR2)  # above the highest pid there is


GONE = 2**22 + 1


def leave(folder, monkeypatch, lines=(), events=(), new_worker="host-2"):
    """Judges a preemption of host-1 in epoch 1 at step 10, told by these events and lines beside the usual ones."""
    killed = []
    monkeypatch.setattr(chaos_run.os, "kill", lambda pid, number: killed.append((pid, number)))
    folder.mkdir(exist_ok=True)
    written = [
        {"kind": "agent_started", "epoch": 1, "host": "host-1", "pid": 77},
        {"kind": "worker_started", "epoch": 1, "host": "host-1", "pid": GONE, "rank": 1},
        {"kind": "alarm", "epoch": 1, "what": "preemption", "detail": "host-1 was told to end"},
        {"kind": "state", "epoch": 1, "from": "DRAINING", "to": "DECIDING", "reason": "all is kept"},
        {"kind": "worker_started", "epoch": 2, "host": new_worker, "pid": GONE, "rank": 1},
        *events,
    ]
    steps = [{"step": 10, "epoch": 1}, {"step": 11, "epoch": 1}, {"step": 12, "epoch": 2}, *lines]
    (folder / "events.jsonl").write_bytes(b"".join(encode(e) for e in written))
    (folder / "metrics.jsonl").write_bytes(b"".join(encode(line) for line in steps))

    class Process:
        @staticmethod
        def poll():
            if killed:  # the agent comes back
                with open(folder / "events.jsonl", "ab") as file:
                    file.write(encode({"kind": "agent_started", "epoch": 2, "host": "host-1", "pid": 78}))

    (folder / "out").touch()
    cluster = RunningCluster(Process(), folder, folder / "out")
    chaos_run._check_leave(cluster, steps[0], 2, "preempt (x)")
    return killed


def test_a_host_that_was_told_to_end_leaves_ends_and_comes_back(tmp_path, monkeypatch):
    assert leave(tmp_path / "run", monkeypatch) == [(77, signal.SIGKILL)]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"lines": [{"step": 12, "epoch": 3}]}, "steps were lost or came twice"),
        ({"lines": [{"step": 15, "epoch": 2}]}, "steps were lost or came twice"),
        ({"events": [{"kind": "fault", "epoch": 2, "class": "transient", "cause": "it hung"}]}, "it hung"),
        ({"new_worker": "host-1"}, "the next world has a worker there"),
        (
            {"events": [{"kind": "worker_started", "epoch": 1, "host": "host-1", "pid": os.getpid(), "rank": 1}]},
            "should have ended, but lives",
        ),
    ],
)
def test_a_preemption_that_costs_something_is_a_problem(tmp_path, monkeypatch, more, says):
    with pytest.raises(AssertionError, match=says):
        leave(tmp_path / "run", monkeypatch, **more)


# What a run leaves behind


@pytest.fixture
def spawn():
    """Starts processes with this command line that do nothing; each may start another one as its child."""
    started = []
    code = "import os, subprocess, sys, time\nwords = os.environ.get('CHILD')\n"
    code += "nothing = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
    code += "print(subprocess.Popen([*nothing, words]).pid if words else 0, flush=True); time.sleep(60)"

    def spawn(*words, child=""):
        command = [sys.executable, "-c", code, *map(str, words)]
        environment = {**os.environ, "CHILD": str(child)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process, int(process.stdout.readline())

    yield spawn
    for process in started:
        process.kill()
        process.communicate()


def test_agents_of_a_run_are_found_by_its_job_and_ended_with_their_memory(tmp_path, spawn):
    run, memory = tmp_path / "run", tmp_path / "memory"
    memory.mkdir()
    coordinator, _ = spawn("coordinator", "--run.dir", run, "--job", "j1")
    agent, _ = spawn("agent", "--job", "j1", "--shared-memory", memory)
    other, _ = spawn("agent", "--job", "j2", "--shared-memory", tmp_path)
    assert left_behind(run) == sorted([coordinator.pid, agent.pid])
    _end_all(run)
    assert (coordinator.wait(), agent.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert left_behind(run) == []
    assert other.poll() is None
    assert not memory.exists()


def test_an_agent_without_a_coordinator_is_found_by_its_zygote(tmp_path, spawn):
    run = tmp_path / "run"
    agent, zygote = spawn("agent", "--job", "j1", child=run)
    try:
        assert left_behind(run) == sorted([agent.pid, zygote])
    finally:
        os.kill(zygote, signal.SIGKILL)
