"""The same command gives the same run bit for bit: twice, and killed with SIGKILL wherever and run again."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import EVERYTHING, NANO, STEPS, command, environment, lines, losses, run, train, wait_for_lines

from jaxscale.checkpoint.restore import list_steps
from jaxscale.train.protocols import ExitReason

KILLED = str(Path(__file__).with_name("killed_run.py"))
PACED = str(Path(__file__).with_name("paced_run.py"))
PACE = 0.05
"""Seconds that a run to be killed from outside takes more in each section of its loop."""
SEED = os.environ.get("JAXSCALE_TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
"""Of where the random kills come: another one each time."""
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


@pytest.mark.parametrize("number", range(2))
def test_killed_at_a_random_step(tmp_path, whole, number):
    """From outside, as the kernel would: a drawn time after a drawn number of lines. What is drawn is printed."""
    print(f"to draw the same again: JAXSCALE_TEST_SEED={SEED}")
    draw = random.Random(f"{SEED} {number}")
    count, delay = draw.randrange(1, STEPS - 1), draw.uniform(0, 4 * PACE)
    print(f"the kill comes {delay:.3f} s after line {count} of metrics.jsonl")
    folder = tmp_path / "run"
    arguments = command(folder, *FLAGS, script=(PACED, str(PACE), str(STEPS), NANO))
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL)
    try:
        wait_for_lines(process, folder, count)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    known = lines(folder)
    assert count <= len(known) < STEPS, "it died in the middle"
    assert known == lines(whole)[: len(known)]
    assert STEPS not in list_steps(folder / "checkpoints")
    assert train(folder, *FLAGS) is ExitReason.COMPLETED
    assert lines(folder) == lines(whole)
    assert len(losses(folder)) == STEPS
    assert epochs(folder)[-1] == 2
