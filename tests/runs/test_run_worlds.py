"""Real worlds of 2, 3 and 4 processes train what one process trains: save, evaluate, stop, go on, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from small_runs import NANO, ROOT, SMALL, environment, lines, losses, train

from jaxscale.checkpoint.restore import list_steps
from jaxscale.testing.processes import PLACE, reserved_port, run_world, started_world
from jaxscale.train.protocols import ExitReason

STEPS, HALF = 10, 5
FLAGS = (
    *("--steps", str(STEPS), "--optim.ema", "0.9", "--model.dropout", "0.1", "--checkpoint.every", "4"),
    *("--data.held-out-documents", "1", "--evaluate.every", "4", "--evaluate.batches", "2"),
)
PRELUDE = (
    "import os, signal, sys\n"
    "from jaxscale.cli import main\n"
    "from jaxscale.train.loop import Loop\n"
    "process = int(sys.argv[sys.argv.index('--distributed') + 1].rpartition(',')[2])\n"
    "write = Loop._write\n"
)
"""Of a script that does something in one process after a step; what it does follows."""


@pytest.fixture(scope="module", name="one")
def _one(tmp_path_factory):
    """The same run in one process, on one device. Read only."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert train(folder, *FLAGS, "--devices", 1) is ExitReason.COMPLETED
    return folder


def arguments(folder, devices, *flags, script=(NANO,)):
    here = ("--run.dir", str(folder), "--devices", str(devices), *flags, "--distributed", PLACE)
    return [*script, *SMALL, *FLAGS, *here]


def run_processes(folder, processes, devices, *flags, check=True, **options):
    """`devices`: of the whole world."""
    return run_world(arguments(folder, devices, *flags, **options), processes, environment=environment(), check=check)


def check_like_one(folder, one):
    """Losses and evaluations within rounding; rows, tokens and everything counted exactly."""
    assert losses(folder) == pytest.approx(losses(one), abs=1e-5)
    for found, expected in zip(lines(folder), lines(one), strict=True):
        assert found.keys() == expected.keys()
        for key in ("step", "row", "rows", "tokens", "skipped", "learning_rate", "eval_tokens"):
            assert found.get(key) == expected.get(key), key
        if "eval_loss" in expected:
            assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


def check_quiet(outcomes):
    """Only process 0 prints; a screen of the start, a few lines, one at the end."""
    assert "done: 10 steps trained" in outcomes[0].stdout.splitlines()[-1]
    assert [outcome.stdout for outcome in outcomes[1:]] == [""] * (len(outcomes) - 1)
    assert not any("Traceback" in outcome.stderr or "error" in outcome.stderr for outcome in outcomes)


def test_two_processes_train_like_one_and_another_number_goes_on(tmp_path, one):
    sample = ("--sample.every", "8", "--sample.prompt", "Story", "--sample.tokens", "4")
    outcomes = run_processes(tmp_path / "run", 2, 2, *sample, "--run.profile", "2:3")
    check_quiet(outcomes)
    check_like_one(tmp_path / "run", one)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [8]
    traces = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert {trace.relative_to(tmp_path / "run" / "profile").parts[0] for trace in traces} == {"process-0", "process-1"}
    assert "2 cpu devices in 2 processes: fsdp 2" in outcomes[0].stdout
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_bytes().splitlines()]
    assert sorted(event["rank"] for event in events if event["kind"] == "worker_started") == [0, 1]
    assert [event["step"] for event in events if event["kind"] == "done"] == [STEPS]
    for step in list_steps(tmp_path / "run" / "checkpoints")[1:]:  # all but one: go on from the first
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    (first,) = list_steps(tmp_path / "run" / "checkpoints")
    assert first in (4, 8)
    check_quiet(run_processes(tmp_path / "run", 4, 4, "--mesh.tensor", "2"))
    check_like_one(tmp_path / "run", one)


def test_two_processes_train_in_the_world_that_slurm_tells_of(tmp_path):
    """`--distributed auto`, with as many devices as each process has, and the port that a variable of JAX's sets."""
    script = tmp_path / "member.py"
    script.write_text(
        "import os, sys\n"
        "address, processes, index = sys.argv.pop().split(',')\n"
        "os.environ |= {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': '127.0.0.1', 'SLURM_NTASKS': processes}\n"
        "os.environ |= {'SLURM_PROCID': index, 'SLURM_LOCALID': index}\n"
        "os.environ['JAX_COORDINATOR_PORT'] = address.rpartition(':')[2]\n"
        "from jaxscale.cli import main\n"
        "sys.exit(main(['train', *sys.argv[1:], '--distributed', 'auto']))\n"
    )
    flags = ("--steps", "2", "--run.dir", str(tmp_path / "run"))
    outcomes = run_world([str(script), NANO, *SMALL, *flags, PLACE], 2, environment=environment())
    assert "2 cpu devices in 2 processes: fsdp 2" in outcomes[0].stdout
    assert "done: 2 steps trained" in outcomes[0].stdout.splitlines()[-1]
    assert outcomes[1].stdout == ""
    assert train(tmp_path / "alone", "--steps", 2, "--devices", 1) is ExitReason.COMPLETED
    check_like_one(tmp_path / "run", tmp_path / "alone")
    assert list_steps(tmp_path / "run" / "checkpoints") == [2]


def test_three_processes_that_do_not_divide_the_batch_of_8(tmp_path, one):
    """Rows of weight 0 fill it; a mesh axis of 3 divides no weight here, so the rows alone are split."""
    outcomes = run_processes(tmp_path / "run", 3, 3, "--mesh.data", "3")
    check_quiet(outcomes)
    check_like_one(tmp_path / "run", one)


def test_a_signal_to_one_of_two_stops_both_at_the_same_step(tmp_path, one):
    """2 processes with 2 devices each; SIGTERM reaches process 1 only. Then one process goes on."""
    folder = tmp_path / "run"
    script = tmp_path / "stop.py"
    script.write_text(
        PRELUDE + f"def stop(self, line):\n"
        f"    write(self, line)\n"
        f"    if process == 1 and line['step'] == {HALF}: os.kill(os.getpid(), signal.SIGTERM)\n"
        "Loop._write = stop\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    outcomes = run_processes(folder, 2, 4, "--steps", "2000", script=(str(script), NANO), check=False)
    assert [outcome.exit_code for outcome in outcomes] == [ExitReason.STOPPED.value] * 2, outcomes
    done = len(losses(folder))
    assert HALF <= done < 200
    assert list_steps(folder / "checkpoints")[-1] == done
    assert f"stopped (another process was asked to stop) after step {done} of 2,000" in outcomes[0].stdout
    assert outcomes[1].stdout == ""
    assert train(folder, *FLAGS, "--devices", 1, "--steps", done + 1) is ExitReason.COMPLETED
    assert len(losses(folder)) == done + 1
    assert losses(folder)[:2] == pytest.approx(losses(one)[:2], abs=1e-5)


def test_four_processes_start_and_stop_and_one_reads_what_they_saved(tmp_path):
    """A signal to process 2 alone stops all four after the same step; one process goes on to what it trains alone."""
    folder = tmp_path / "run"
    script = tmp_path / "stop.py"
    script.write_text(
        PRELUDE + f"def stop(self, line):\n"
        f"    write(self, line)\n"
        f"    if process == 2 and line['step'] == {HALF}: os.kill(os.getpid(), signal.SIGTERM)\n"
        "Loop._write = stop\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    flags = ("--optim.schedule", "constant", "--data.held-out-documents", "0", "--evaluate.every", "0")
    mesh = ("--mesh.tensor", "2", "--mesh.data", "2")
    outcomes = run_processes(folder, 4, 4, *flags, *mesh, "--steps", "2000", script=(str(script), NANO), check=False)
    assert [outcome.exit_code for outcome in outcomes] == [ExitReason.STOPPED.value] * 4, outcomes
    assert "4 cpu devices in 4 processes: data 2 x tensor 2" in outcomes[0].stdout
    done = len(losses(folder))
    assert HALF <= done < 200
    assert f"stopped (another process was asked to stop) after step {done} of 2,000" in outcomes[0].stdout
    assert [outcome.stdout for outcome in outcomes[1:]] == [""] * 3
    assert not any("Traceback" in outcome.stderr or "error" in outcome.stderr for outcome in outcomes)
    assert list_steps(folder / "checkpoints")[-1] == done
    here = (*FLAGS, *flags, "--devices", 1, "--steps", done + 2)
    assert train(folder, *here) is ExitReason.COMPLETED
    assert train(tmp_path / "alone", *here) is ExitReason.COMPLETED
    check_like_one(folder, tmp_path / "alone")


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_killed_process_ends_the_others(tmp_path, victim):
    """Within seconds, with an exit code that is not 0 and a line that says why; the run goes on afterwards."""
    folder = tmp_path / "run"
    logs = tmp_path / "logs"
    logs.mkdir()
    flags = ("--steps", "100000", "--checkpoint.every", "1")  # a save is under way at almost any time
    with started_world(arguments(folder, 2, *flags), 2, 1, environment(), logs) as members:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 6:
            assert time.monotonic() < deadline, (logs / "0.err").read_text()
            assert not any(member.poll() is not None for member in members), (logs / "0.err").read_text()
            time.sleep(0.05)
        os.kill(members[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        other = members[1 - victim]
        other.wait(60)
        seconds = time.monotonic() - began
    assert other.returncode == 1
    assert seconds < 60
    said = (logs / f"{1 - victim}.err").read_text().splitlines()
    (text,) = [line for line in said if not line.startswith("WARNING jaxscale.checkpoint")]  # saves come slowly
    expected = (
        "jaxscale: process 1 ends because process 0 of 2 ended without a word",
        "error: process 0 of 2 lost another one in the middle of a step",
    )
    assert text.startswith(expected[victim])
    done = len(losses(folder))
    assert train(folder, *FLAGS, "--devices", 1, "--steps", done + 1) is ExitReason.COMPLETED
    assert len(losses(folder)) == done + 1


def test_a_process_that_fails_ends_the_world_with_its_reason(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(
        PRELUDE + "def fail(self, line):\n"
        "    if process == 1 and line['step'] == 2: raise OSError(28, 'No space left on device')\n"
        "    write(self, line)\n"
        "Loop._write = fail\n"
        "sys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    outcomes = run_processes(tmp_path / "run", 2, 2, script=(str(script), NANO), check=False)
    assert [(outcome.exit_code, outcome.killed) for outcome in outcomes] == [(1, False), (1, False)]
    assert "No space left on device" in outcomes[0].stderr
    assert "process 0 ends because process 1 of 2 failed" in outcomes[0].stderr
    assert outcomes[1].stderr.strip().splitlines()[-1].startswith("error: [Errno 28] No space left on device; free")


def test_bad_input_is_said_once_by_every_process_and_leaves_nothing(tmp_path):
    outcomes = run_processes(tmp_path / "run", 2, 2, "--mesh.tensor", "4", check=False)
    assert [(outcome.exit_code, outcome.killed) for outcome in outcomes] == [(2, False)] * 2
    assert "does not match 2 devices" in outcomes[0].stderr
    assert "does not match 2 devices" in outcomes[1].stderr
    assert not (tmp_path / "run").exists()
    assert str(ROOT) not in outcomes[0].stdout


def started_unlike(tmp_path, own):
    """Two processes that differ in the flags `own`, by process; returns what both say. Nothing may be written."""
    script = tmp_path / "unlike.py"
    script.write_text(
        "import sys\n"
        "from jaxscale.cli import main\n"
        "process = int(sys.argv[sys.argv.index('--distributed') + 1].rpartition(',')[2])\n"
        f"sys.exit(main(['train', *sys.argv[1:], *{own!r}[process]]))\n"
    )
    outcomes = run_processes(tmp_path / "run", 2, 2, script=(str(script), NANO), check=False)
    assert [(outcome.exit_code, outcome.killed) for outcome in outcomes] == [(2, False)] * 2, outcomes
    assert outcomes[0].stderr == outcomes[1].stderr
    assert outcomes[0].stderr.startswith("error: the processes were not started alike (process 1: ")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl") == ["unlike.py"]
    return outcomes[0].stderr


def test_another_config_or_directory_is_refused_by_all(tmp_path):
    own = [
        [],
        ["--optim.learning-rate", "1", "--run.dir", str(tmp_path / "other"), "--data.cache", str(tmp_path / "c")],
    ]
    own[0] = ["--data.cache", str(tmp_path / "b.jsonl"), "--run.compilation-cache", "off"]
    own[1][-1] = str(tmp_path / "c.jsonl")
    said = started_unlike(tmp_path, own)
    assert "optim.learning-rate is 1.0, on process 0 0.0" in said
    assert f'run.dir is "{tmp_path / "other"}", on process 0 "{tmp_path / "run"}"' in said
    assert "data.cache is" not in said
    assert "compilation-cache is" not in said


def test_other_data_at_the_same_address_is_refused_by_all(tmp_path):
    """As on two hosts with disks of their own: each process has a folder of its own to start from."""
    for index in range(2):
        (tmp_path / f"{index}.jsonl").mkdir()
        (tmp_path / f"{index}.jsonl" / "a.txt").write_text(f"{index} Once more unto the breach, dear friends\n" * 50)
    flags = ["--data.path", "a.txt", "--data.held-out-documents", "0", "--evaluate.every", "0"]
    script = tmp_path / "there.py"
    script.write_text(
        "import os, sys\nfrom jaxscale.cli import main\nprocess = sys.argv[-1][-1]\n"
        f"os.chdir({str(tmp_path)!r} + f'/{{process}}.jsonl')\nsys.exit(main(['train', *sys.argv[1:]]))\n"
    )
    outcomes = run_processes(tmp_path / "run", 2, 2, *flags, script=(str(script), NANO), check=False)
    assert [(outcome.exit_code, outcome.killed) for outcome in outcomes] == [(2, False)] * 2, outcomes
    assert outcomes[0].stderr == outcomes[1].stderr
    assert "content of a.txt is" in outcomes[0].stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_world_forms_ends_at_once(tmp_path, number):
    """Process 1 never comes; the main thread waits for it inside JAX, where no handler of Python's runs."""
    with reserved_port() as port:
        command = [sys.executable, NANO, *SMALL, "--run.dir", str(tmp_path / "run"), "--distributed"]
        command.append(f"127.0.0.1:{port},2,0")
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 60
            while not is_listening(port):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            _, text = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 128 + number
    assert text == f"error: {number.name} came while the processes of the world met; nothing was trained or written\n"
    assert not (tmp_path / "run").exists()


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_second_signal_ends_what_waits_in_native_code(tmp_path):
    """Here at a barrier that the other process does not come to; only a thread of its own can hear the signal."""
    code = (
        "import sys, threading, time\nfrom jaxscale import world as w\nfrom jaxscale.train.stop import signals\n"
        "with w.membership(w.parse_distributed(sys.argv[1])) as world, signals():\n"
        "    print('here', flush=True)\n"
        "    w.barrier(world, 'never', 60) if world.index else time.sleep(60)\n"
    )
    with started_world(code, 2, folder=tmp_path) as members:
        deadline = time.monotonic() + 60
        while not (tmp_path / "1.out").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        members[1].send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert members[1].poll() is None
        members[1].send_signal(signal.SIGTERM)
        assert members[1].wait(20) == 128 + signal.SIGTERM
