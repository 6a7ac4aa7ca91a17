"""What a run can have, in worlds of two and four processes: the same lines as one process writes on the same mesh."""

import json
import math
import shutil
from pathlib import Path

import pytest
from small_runs import SMALL, environment, lines

from jaxscale import trainer
from jaxscale.checkpoint.restore import list_steps
from jaxscale.commands.train import read
from jaxscale.testing.processes import PLACE, run_world
from jaxscale.train.protocols import ExitReason, World

RECIPE = str(Path(__file__).with_name("poisoned_recipe.py"))
ROWS, STEPS, POISONED, MORE = 8, 6, 5, 9
MESH = ("--devices", 2, "--optim.schedule", "constant")
HELD_OUT = ("--data.held-out-documents", 1, "--evaluate.every", 3, "--evaluate.batches", 2)
FEATURES = (
    *HELD_OUT,
    *("--optim.name", "muon", "--optim.ema", 0.9, "--model.dropout", 0.1, "--train.z-loss", 1e-4),
    *("--train.microbatches", 2, "--train.noise-scale", "--run.layer-stats-every", 3),
    *("--model.first", ROWS * (POISONED - 1), "--model.last", ROWS * POISONED),
)
ILL_CONDITIONED = ("noise_scale", "noise_trace", "signal")
"""Differences of nearly equal sums: they show the rounding of float32 a thousand times larger."""


def arguments(folder, *flags):
    return [RECIPE, *SMALL, "--run.dir", str(folder), *map(str, (*MESH, *flags))]


def train_alone(folder, *flags):
    """In this process, on two of its devices."""
    recipe, command = read(arguments(folder, *flags))
    assert trainer.train(command.config, World(), recipe.hooks(command.config)) is ExitReason.COMPLETED


def train_in(count, folder, *flags):
    """In so many processes with a device each; returns what process 0 printed."""
    words = [*arguments(folder, *flags, "--devices", count), "--distributed", PLACE]
    outcomes = run_world(words, count, environment=environment())
    assert f"{count} cpu devices in {count} processes: fsdp {count}" in outcomes[0].stdout
    return outcomes[0].stdout


def train_in_two(folder, *flags):
    return train_in(2, folder, *flags)


@pytest.fixture(scope="module", name="one")
def _one(tmp_path_factory):
    """The run with every feature, in one process. Read only."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train_alone(folder, *FEATURES, "--steps", STEPS)
    return folder


@pytest.fixture(scope="module", name="two")
def _two(tmp_path_factory):
    """The same in two processes. Read only."""
    folder = tmp_path_factory.mktemp("two") / "run"
    train_in_two(folder, *FEATURES, "--steps", STEPS)
    return folder


def check_alike(folder, expected_folder):
    """Every field of every line: whole numbers the same, floats within rounding."""
    for found, expected in zip(lines(folder), lines(expected_folder), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            where = f"{name} of step {expected['step']}"
            if isinstance(value, int):
                assert found[name] == value, where
            else:
                relative = 0.02 if name in ILL_CONDITIONED else 1e-4
                assert found[name] == pytest.approx(value, rel=relative, abs=1e-5, nan_ok=True), where


def test_four_processes_write_the_lines_of_one(tmp_path):
    train_alone(tmp_path / "one", *FEATURES, "--steps", STEPS, "--devices", 4)
    train_in(4, tmp_path / "four", *FEATURES, "--steps", STEPS)
    check_alike(tmp_path / "four", tmp_path / "one")


def test_two_processes_write_the_lines_of_one(one, two):
    check_alike(two, one)
    found = lines(two)
    assert [line["step"] for line in found] == [*range(1, STEPS + 1)]
    always = {"noise_scale", "noise_trace", "signal", "spike", "z_loss", "spaces", "scale"}
    sometimes = {"eval_loss", "mine/loss", "mine/batches", "layers/update/layers/mlp/up"}
    assert all(always <= line.keys() for line in found)
    assert [sorted(sometimes & line.keys()) for line in found] == [[], [], sorted(sometimes)] * 2
    assert found[2]["scale"] != found[3]["scale"], "the optimizer moved it"


def test_a_step_that_one_of_two_skips_both_skip_and_it_is_told_once(two):
    found = lines(two)
    assert [line["skipped"] for line in found] == [0] * (POISONED - 1) + [1] * (STEPS - POISONED + 1)
    assert [math.isnan(line["loss"]) for line in found] == [step == POISONED for step in range(1, STEPS + 1)]
    events = [json.loads(line) for line in (two / "events.jsonl").read_bytes().splitlines()]
    told = [event["detail"] for event in events if event["kind"] == "alarm" and event["what"] == "update skipped"]
    assert [detail.partition(",")[0] for detail in told] == [f"step {POISONED}: update skipped"]


def test_two_processes_train_more_steps_of_a_finished_run(tmp_path, one, two):
    alone = shutil.copytree(one, tmp_path / "one")
    folder = shutil.copytree(two, tmp_path / "two")
    train_alone(alone, *FEATURES, "--steps", MORE)
    said = train_in_two(folder, *FEATURES, "--steps", MORE)
    assert f"schedule: constant: {STEPS} steps become {MORE}, the learning rate stays at" in said
    check_alike(folder, alone)
    assert [line["step"] for line in lines(folder)] == [*range(1, MORE + 1)]
    assert list_steps(folder / "checkpoints") == [STEPS, MORE]


def test_two_processes_start_from_the_weights_of_another_run(tmp_path, one, two):
    """With Adafactor, which factors its state over the two of them."""
    flags = ("--optim.name", "adafactor", *HELD_OUT, "--steps", 3, "--init-from")
    train_alone(tmp_path / "one", *flags, f"{one}@{STEPS}")
    said = train_in_two(tmp_path / "two", *flags, f"{two}@{STEPS}")
    assert f"weights from step {STEPS} of {two}; optimizer, schedule and data start afresh" in said
    check_alike(tmp_path / "two", tmp_path / "one")
    assert lines(tmp_path / "two")[0]["row"] == 0
    assert lines(tmp_path / "two")[0]["loss"] < lines(two)[0]["loss"], "trained weights"
