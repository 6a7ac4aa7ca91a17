"""The same command gives the same run bit for bit: twice, and killed with SIGKILL wherever and run again."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import EVERYTHING, NANO, STEPS, command, environment, lines, losses, run, train

from jaxscale.checkpoint.restore import list_steps
from jaxscale.train.protocols import ExitReason

KILLED = str(Path(__file__).with_name("killed_run.py"))
FLAGS = (*EVERYTHING, "--devices", 2, "--checkpoint.every", 2)


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def test_the_same_command_twice_is_the_same_bit_for_bit(tmp_path, whole):
    assert train(tmp_path / "run", *EVERYTHING, "--devices", 2) is ExitReason.COMPLETED
    assert lines(tmp_path / "run") == lines(whole)
    assert len(losses(whole)) == STEPS
    assert lines(whole)[3]["eval_loss"] != lines(whole)[7]["eval_loss"]


def test_another_seed_is_another_run(tmp_path, whole):
    assert train(tmp_path / "run", *EVERYTHING, "--devices", 2, "--steps", 2, "--seed", 1) is ExitReason.COMPLETED
    assert losses(tmp_path / "run")[0] != losses(whole)[0]


def test_killed_again_and_again_the_joined_run_is_the_undisturbed_one(tmp_path, whole):
    """Before the first checkpoint, between steps, during an evaluation, during a save, before the end."""
    folder = tmp_path / "run"
    places = ["compile:0", "written:2", "evaluate:4", "step:7", f"save:{STEPS}"]
    for starts, place in enumerate(places, start=1):
        result = run(command(folder, *FLAGS, script=(KILLED, place, NANO)))
        assert result.returncode == -signal.SIGKILL, f"{place}: {result.stdout}{result.stderr}"
        known = lines(folder)
        assert known == lines(whole)[: len(known)], place
        begun = [json.loads(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
        assert [event["epoch"] for event in begun if event["kind"] == "worker_started"] == [*range(1, starts + 1)]
    assert train(folder, *FLAGS) is ExitReason.COMPLETED
    assert lines(folder) == lines(whole)
    assert len(losses(folder)) == STEPS
    assert epochs(folder) == sorted(epochs(folder))
    assert epochs(folder)[-1] == len(places) + 1
    assert list_steps(folder / "checkpoints")[-1] == STEPS


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_time(tmp_path, whole, seed):
    """From outside, as the kernel would: some time after the first lines are there."""
    random.seed(seed)
    folder = tmp_path / "run"
    process = subprocess.Popen(command(folder, *FLAGS), env=environment(), stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(random.random())
    finally:
        process.kill()
        process.wait()
    assert train(folder, *FLAGS) is ExitReason.COMPLETED
    assert lines(folder) == lines(whole)
    assert len(losses(folder)) == STEPS
