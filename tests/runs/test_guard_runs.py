"""Losses or gradients that are no number: the update is skipped, counted and told; 50 in a row end the run."""

import dataclasses
import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from poisoned_recipe import PoisonedConfig
from small_runs import at_section, config_of, lines, losses, signal_self

from jaxscale import trainer
from jaxscale.checkpoint.restore import list_steps, restore
from jaxscale.mesh import make_mesh
from jaxscale.optim.build import make_optimizer
from jaxscale.train.guard import PERSISTS
from jaxscale.train.loop import MOST_SKIPPED, Diverged
from jaxscale.train.protocols import ExitReason, World
from jaxscale.train.state import abstract_state

ROWS = 8


def poisoned(folder, first_step, last_step, *flags, **poison):
    """A config whose steps first_step .. last_step (from 1) are poisoned."""
    config = config_of("--run.dir", folder, "--devices", 2, "--optim.ema", 0.9, *flags)
    fields = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
    rows = {"first": (first_step - 1) * ROWS, "last": last_step * ROWS, **poison}
    return replace(config, model=PoisonedConfig(**fields, **rows))


def train(config):
    return trainer.train(config, World())


def alarms(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    return [event["detail"] for event in events if event["kind"] == "alarm" and event["what"] == "update skipped"]


def state_of(config, folder, step):
    with jax.set_mesh(make_mesh(config)):
        task = config.model.task(config)
        wanted = abstract_state(config, task, make_optimizer(config.optim, task.parameters, config.steps))
        state, _ = restore(folder / "checkpoints", step, wanted)
        return jax.tree.map(np.asarray, state)


def test_one_poisoned_step_changes_nothing_and_the_run_goes_on(tmp_path, capsys):
    """Saved before and after the poisoned step 4, the two states differ in the count of skipped updates alone."""
    folder = tmp_path / "run"
    config = poisoned(folder, 4, 4, "--steps", 8)
    for step in (3, 4):
        with at_section("step", step - 1, signal_self()):
            assert train(config) is ExitReason.STOPPED
    before, after = (state_of(config, folder, step) for step in (3, 4))
    assert {name for name in before if not same(before[name], after[name])} == {"skipped"}
    assert (int(before["skipped"]), int(after["skipped"])) == (0, 1)
    assert train(config) is ExitReason.COMPLETED
    assert not same(state_of(config, folder, 8)["params"], after["params"])
    found = lines(folder)
    assert [line["skipped"] for line in found] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [math.isfinite(line["loss"]) for line in found] == [True] * 3 + [False] + [True] * 4
    assert [line["row"] for line in found] == [8 * n for n in range(8)], "a skipped step moves the row"
    (alarm,) = alarms(folder)
    assert alarm.startswith("step 4: update skipped, loss nan, gradient norm nan")
    assert "step 4: update skipped, loss nan" in capsys.readouterr().out


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b)))


def test_an_undisturbed_run_differs_only_after_the_poisoned_step(tmp_path):
    for name, last in {"poisoned": 4, "clean": 0}.items():
        assert train(poisoned(tmp_path / name, 4, last, "--steps", 6)) is ExitReason.COMPLETED
    assert losses(tmp_path / "poisoned")[:3] == losses(tmp_path / "clean")[:3]
    assert losses(tmp_path / "poisoned")[4] != losses(tmp_path / "clean")[4]
    assert alarms(tmp_path / "clean") == []


def test_a_gradient_that_is_no_number_is_skipped_although_the_loss_is_one(tmp_path, capsys):
    """In one of two microbatches."""
    folder = tmp_path / "run"
    config = poisoned(folder, 4, 4, "--steps", 6, "--train.microbatches", 2, slope_only=True)
    assert train(config) is ExitReason.COMPLETED
    found = lines(folder)
    assert [line["skipped"] for line in found] == [0, 0, 0, 1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in found)
    assert [math.isfinite(line["grad_norm"]) for line in found] == [True] * 3 + [False] + [True] * 2
    (alarm,) = alarms(folder)
    assert alarm == f"step 4: update skipped, loss {found[3]['loss']}, gradient norm nan"
    assert alarm in capsys.readouterr().out


def test_50_in_a_row_end_the_run(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        Diverged, match=r"50 updates in a row were skipped up to step 52 \(loss nan, gradient norm nan\)"
    ):
        train(poisoned(folder, 3, 1000, "--steps", 1000, "--checkpoint.every", 2))
    assert MOST_SKIPPED == 50
    assert len(alarms(folder)) == 50
    assert [line["skipped"] for line in lines(folder)] == [0, 0, *range(1, 51)]
    assert list_steps(folder / "checkpoints"), "there is something to go back to"


def test_a_spike_above_the_limit_is_skipped(tmp_path):
    flags = ("--steps", 14, "--train.spike-window", 8)
    assert train(poisoned(tmp_path / "on", 12, 12, *flags, "--train.skip-spikes-above", 50, factor=9.0))
    assert train(poisoned(tmp_path / "off", 12, 12, *flags, factor=9.0))
    assert [line["skipped"] for line in lines(tmp_path / "on")] == [0] * 11 + [1] * 3
    assert [line["skipped"] for line in lines(tmp_path / "off")] == [0] * 14
    assert lines(tmp_path / "on")[11]["spike"] > 50
    assert losses(tmp_path / "on")[:12] == losses(tmp_path / "off")[:12]
    assert losses(tmp_path / "on")[12] != losses(tmp_path / "off")[12]


def test_a_level_that_stays_is_accepted_also_by_a_run_that_was_stopped_before(tmp_path):
    """From step 20 on every loss is 9 times as high. A run stopped among the skips decides as this one."""
    flags = ("--steps", 40, "--train.spike-window", 40, "--train.skip-spikes-above", 20)

    def config(name):
        return poisoned(tmp_path / name, 20, 1000, *flags, factor=9.0)

    assert train(config("whole")) is ExitReason.COMPLETED
    skipped = [line["skipped"] for line in lines(tmp_path / "whole")]
    assert skipped == [0] * 19 + list(range(1, PERSISTS + 1)) + [PERSISTS] * (40 - 19 - PERSISTS)
    for step in (22, 19 + PERSISTS):
        with at_section("step", step - 1, signal_self()):
            assert train(config("stopped")) is ExitReason.STOPPED
    assert train(config("stopped")) is ExitReason.COMPLETED
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    assert same(state_of(config("whole"), tmp_path / "whole", 40), state_of(config("whole"), tmp_path / "stopped", 40))
