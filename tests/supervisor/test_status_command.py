"""`jaxscale status`: says how a run stands from its folder alone, alive or dead, supervised or not."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from told_lines import KILLED, START, began, event, fault, metrics, recovery, state, write

from jaxscale.checkpoint import layout
from jaxscale.cli import main
from jaxscale.commands.status import QUIET_SECONDS, shown, status_lines
from jaxscale.run_directory import RunDirectoryError, _Lock
from jaxscale.supervisor import status as looks
from jaxscale.supervisor.status import Watcher

CONFIG = {"name": "lm_nano", "steps": 30, "mesh": {"data": 2, "fsdp": 1, "tensor": None}}


@pytest.fixture
def run(tmp_path):
    """A supervised run of 25 steps, the last at 12.5 s, with one fault behind it; nobody holds its lock."""
    run = tmp_path / "run"
    write(run, [*began(), *(metrics(8 + step / 10, step) for step in range(1, 21)), *fault(11)])
    write(run, [event(9, "sealed", tier="memory", step=10, bytes=1, seconds=0.1)])
    write(run, [*recovery(11.3, 2, 20), *(metrics(12 + step / 10, 20 + step, 2) for step in range(1, 6))])
    write(run, [event(12.4, "sealed", 2, tier="memory", step=24, bytes=1, seconds=0.1)])
    (run / "config.json").write_text(json.dumps(CONFIG))
    (run / ".lock").write_text("pid 1 on vm\n")
    return run


@pytest.fixture
def held(run):
    """The run while its coordinator lives."""
    with open(run / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield run


def look(run, at=13.0):
    return Watcher(run).look(START + at)


def durable(run, step, at):
    folder = run / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    for name in (layout.COMMIT_FILE, layout.MANIFEST):
        (folder / name).write_text("{}")
        os.utime(folder / name, (START + at, START + at))


def test_a_run_that_goes_on(held):
    durable(held, 20, 11.0)
    status = look(held)
    assert (status.life, status.holder, status.is_supervised) == ("running", "pid 1 on vm", True)
    assert (status.state, status.epoch, status.hosts, status.mesh) == ("RUNNING", 2, ("host-0", "host-1"), {"data": 2})
    assert (status.step, status.steps, status.loss) == (25, 30, 2.0)
    assert status.steps_per_second == pytest.approx(10.0), "of this epoch alone: the pause is not in it"
    assert status.step_age_seconds == pytest.approx(0.5)
    assert (status.memory.step, status.memory.behind) == (24, 1)
    assert status.memory.age_seconds == pytest.approx(0.6)
    assert (status.durable.step, status.durable.behind) == (20, 5)
    assert status.durable.age_seconds == pytest.approx(2.0)
    assert status.fault_count == 1
    [found] = status.faults
    assert (found.text, found.fault_class, found.step) == (KILLED, "recoverable", 21)
    assert (found.age_seconds, found.recovery_seconds) == (pytest.approx(2.0), pytest.approx(1.1))


def test_a_coordinator_that_shares_its_lock_is_there(run):
    """Those of one job do; a look must neither pass them by nor keep anybody out."""
    lock = _Lock(run, "one")
    assert look(run).life == "running"
    assert look(run).holder.startswith("job one: pid")
    second = _Lock(run, "one")
    with pytest.raises(RunDirectoryError, match="in use"):
        _Lock(run, "other")
    second.free()
    lock.free()
    assert look(run).life == "gone"


def test_a_start_waits_for_a_look(run):
    with open(run / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        _Lock(run).free()


def test_the_screen(held):
    durable(held, 20, 11.0)
    assert status_lines(look(held)) == [
        f"lm_nano  {held}",
        "  run     running (pid 1 on vm)",
        "  state   RUNNING for 1.3 s: all workers have done a step",
        "  world   epoch 2: 2 hosts (host-0, host-1), data 2",
        "  step    25 of 30, 10 steps/s, loss 2.0000, 0.5 s ago",
        "  memory  step 24, 0.6 s old, 1 step behind",
        "  durable step 20, 2.0 s old, 5 steps behind",
        "  faults  1; the last ones:",
        f"    2.0 s ago: {KILLED} (recoverable): back after 1.1 s at step 21",
    ]


def test_further_places_of_checkpoints(held):
    good = {"address": "/far", "step": 20, "sealed": START + 11, "failing_since": None, "reason": "", "lost": False}
    failing = {**good, "address": "s3://b/runs", "step": None, "sealed": None, "failing_since": START + 1}
    lost = {**good, "address": "s3://c", "reason": "it belongs to job x now", "lost": True}
    (held / "locations.json").write_text(json.dumps([good, {**failing, "reason": "S3Error: 503"}, lost]))
    assert [line for line in status_lines(look(held)) if line.startswith("  copy")] == [
        "  copy    /far: step 20, 2.0 s old, 5 steps behind",
        "  copy    s3://b/runs: no step yet; FAILING for 12 s: S3Error: 503",
        "  copy    s3://c: step 20, 2.0 s old, 5 steps behind; LOST: it belongs to job x now",
    ]
    assert json.loads(shown(look(held), as_json=True))["locations"][1]["failing_seconds"] == pytest.approx(12.0)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"step": 1}]', '[{"address": "x", "step": "?"}]', "{"])
def test_what_makes_no_sense_of_further_places_is_left_out(held, text):
    (held / "locations.json").write_text(text)
    assert look(held).locations == ()


def test_a_fault_that_nothing_came_of_yet(held):
    write(held, fault(12.8, "worker of host-0 was ended by SIGKILL in step after 25 updates", epoch=2))
    status = look(held)
    assert status.state == "SUSPECT"
    assert [one.recovery_seconds is None for one in status.faults] == [False, True]
    assert status_lines(status)[-1].endswith("(recoverable): training has not gone on")


def test_a_dead_coordinator_is_not_taken_for_a_living_one(run):
    status = look(run)
    assert (status.life, status.holder, status.steps_per_second) == ("gone", "pid 1 on vm", None)
    assert status.memory.step == 24, "agents keep it, and a coordinator may come back"
    assert "killed, or about to be started again; the last line is 0.5 s old" in status_lines(status)[1]
    late = status_lines(look(run, 13 + QUIET_SECONDS))[1]
    assert "gone without a word (pid 1 on vm); the last line is 30 s old; the same command again goes on" in late


@pytest.mark.parametrize(
    ("lines", "life", "said"),
    [
        (
            [state(13, "RUNNING", "DONE", "every step is trained and saved", 2), event(13, "done", 2, step=30)],
            "done",
            "done: ",
        ),
        ([state(13, "DRAINING", "DONE", "stopped (SIGINT) and saved", 2)], "stopped", "stopped; the same command"),
        ([state(13, "DECIDING", "ESCALATED", "same error twice: it raised", 2)], "failed", "failed; "),
    ],
)
def test_a_run_that_has_ended(run, lines, life, said):
    write(run, lines)
    (run / ".lock").write_text("")
    status = look(run, 20)
    assert (status.life, status.memory) == (life, None)
    assert said in status_lines(status)[1]
    assert "  memory  gone with the processes of the run" in status_lines(status)


def test_a_run_that_is_started_again(run):
    write(run, [state(13, "DRAINING", "DONE", "stopped (SIGINT) and saved", 2)])
    write(run, [event(20, "coordinator_started", 3, pid=2, host="vm", address="x")])
    with open(run / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert look(run, 21).life == "running"


def test_a_plain_run_has_no_coordinator_and_no_memory(tmp_path):
    run = tmp_path / "plain"
    start = {**event(0, "worker_started", pid=5, host="vm", rank=0), "source": "worker"}
    write(run, [start, metrics(1, 1), metrics(2, 2)])
    (run / "config.json").write_text(json.dumps(CONFIG))
    (run / ".lock").write_text("pid 5 on vm\n")
    with open(run / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = status_lines(look(run, 3))
        assert [line.split()[0] for line in lines[1:]] == ["run", "world", "step", "durable"]
        assert "2 of 30, 1 steps/s" in lines[3]
    gone = status_lines(look(run, 4))[1]
    assert "its process is gone without a word (pid 5 on vm)" in gone
    write(run, [{**event(5, "done", step=30), "source": "worker"}])
    assert look(run, 6).life == "done"
    write(run, [{**start, "time": START + 9, "epoch": 2}])
    assert look(run, 9).life == "gone", "begun again, and killed"


def test_a_run_that_has_only_begun(tmp_path):
    run = tmp_path / "new"
    write(run, [event(0, "coordinator_started", pid=1, host="vm", address="x")])
    lines = status_lines(look(run, 1))
    assert lines[0].startswith("a run that has not begun")
    assert "  world   no worker has begun" in lines


def test_looking_again_reads_what_is_new(held):
    watcher = Watcher(held)
    assert watcher.look(START + 13).step == 25
    write(held, [metrics(13.1, 26, 2)])
    assert watcher.look(START + 13.2).step == 26


def test_of_a_long_file_the_end_is_read_and_old_faults_end_with_their_states(held, monkeypatch):
    monkeypatch.setattr(looks, "METRICS_BYTES", 2 * len(json.dumps(metrics(12.5, 25, 2))))
    status = look(held)
    assert status.step == 25
    assert status.faults[0].recovery_seconds == pytest.approx(0.7), "when all workers had done a step"
    assert status.faults[0].step is None


def test_json_is_what_any_parser_reads(held, capsys):
    write(held, [{**metrics(12.6, 26, 2), "loss": None, "nonfinite": {"loss": "nan"}}])
    assert main(["status", str(held), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda _: pytest.fail("not JSON"))
    assert (found["life"], found["step"], found["memory"]["step"], found["durable"]) == ("running", 26, 24, None)
    assert found["faults"][0]["fault_class"] == "recoverable"
    assert shown(look(held), as_json=False).count("\n") == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}/absent"], "is not a run directory: it is not there; give the --run.dir of a run"),
        (["{}"], "it has neither config.json nor events.jsonl"),
        (["{}/file"], "it is a file"),
        ([], "status needs a run directory"),
        (["{}", "--wach"], "did you mean --watch?"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, arguments, said):
    (tmp_path / "file").touch()
    assert main(["status", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_watching_ends_with_ctrl_c_and_success(run):
    command = [sys.executable, "-m", "jaxscale", "status", str(run), "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        looked = [json.loads(process.stdout.readline())["step"] for _ in range(2)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert looked == [25, 25]
    assert process.returncode == 0


def test_looking_leaves_no_trace(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    look(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    with open(run / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        ({"devices": 8, "mesh": {"data": None, "fsdp": None, "tensor": None}}, {"fsdp": 8}),
        ({"devices": 8, "mesh": {"data": None, "fsdp": None, "tensor": 2}}, {"fsdp": 4, "tensor": 2}),
        ({"devices": 8, "mesh": {"data": 2, "fsdp": 4, "tensor": None}}, {"data": 2, "fsdp": 4}),
        ({"devices": 0, "mesh": {"data": None, "fsdp": None, "tensor": None}}, None),
        ({"devices": 0, "on": "v5e-256", "mesh": {"data": None, "fsdp": None, "tensor": 2}}, None),
        ({"devices": 0, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}}, {}),
    ],
)
def test_the_mesh_is_the_one_that_the_config_makes(config, mesh):
    assert looks._mesh(config) == mesh


@pytest.mark.parametrize("damaged", ["", "[]", "{"])
def test_a_damaged_config_is_named_and_nothing_is_made_up(damaged, tmp_path, capsys):
    (tmp_path / "config.json").write_text(damaged)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics(1.0, 3)) + "\n")
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "DAMAGED config.json" in out
    assert "not begun" not in out
    assert " of 0" not in out


def test_damaged_lines_are_counted_and_what_is_whole_is_shown(run, capsys):
    metrics_file = run / "metrics.jsonl"
    metrics_file.write_bytes(b"\xff\x00\n{broken\n" + metrics_file.read_bytes())
    assert main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "damaged 2 lines of metrics.jsonl" in out
    assert "25 of 30" in out
    assert look(run).damaged == {"metrics.jsonl": 2}


def test_a_whole_run_has_no_damaged_lines(run, capsys):
    assert main(["status", str(run)]) == 0
    assert "damaged" not in capsys.readouterr().out
