"""How far apart durable saves are, and that all processes of a world save at one step."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.checkpoint.due import Apart
from jaxscale.checkpoint.interval import (
    LEAST_SECONDS,
    PRIOR_SECONDS,
    SLOWDOWN,
    WRITING_SHARE,
    SaveCosts,
    is_noticeable,
    young_daly,
)
from jaxscale.checkpoint.layout import list_steps
from jaxscale.cli import main
from jaxscale.config import CheckpointConfig, ConfigError
from jaxscale.testing.processes import run_world
from jaxscale.train.protocols import World

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
SECONDS = st.floats(0, 1e5)


def lost(interval, cost, between):
    """Share of all time that is lost: to saves, and to what is trained again after a failure."""
    return cost / interval + interval / (2 * between)


@given(st.floats(1e-3, 1e3), st.floats(10, 1e7), st.floats(0.2, 5))
def test_no_other_interval_loses_less(cost, between, other):
    best = young_daly(cost, between)
    assert lost(best, cost, between) <= lost(best * other, cost, between) * (1 + 1e-9)


@given(st.floats(1, 1e6), st.lists(st.tuples(SECONDS, SECONDS), max_size=12), SECONDS, st.integers(0, 50))
def test_within_its_bounds_whatever_was_measured(at_most, saves, trained, failures):
    costs = SaveCosts()
    for blocked, seconds in saves:
        costs = costs.with_save(blocked, seconds)
    found = costs.seconds_between(at_most, trained, failures)
    assert min(LEAST_SECONDS, at_most) <= found <= at_most
    assert costs.seconds_between(at_most, trained, failures + 1) <= found


def test_from_what_saves_cost():
    costs = SaveCosts().with_save(5.0, 20.0).with_save(7.0, 20.0).with_save(100.0, 20.0)
    wanted = math.sqrt(2 * (7.0 + SLOWDOWN * 20.0) * PRIOR_SECONDS)
    assert costs.seconds_between(1e5, 0.0) == pytest.approx(wanted)
    slow = SaveCosts().with_save(0.0, 1000.0)
    assert slow.seconds_between(1e5, 0.0) == pytest.approx(1000.0 / WRITING_SHARE)


def test_what_is_worth_telling():
    assert is_noticeable(300.0, 0.0)
    assert not is_noticeable(300.0, 300.0)
    assert not is_noticeable(370.0, 300.0)
    assert is_noticeable(380.0, 300.0)
    assert is_noticeable(230.0, 300.0)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def events_of(clock, at_most=60.0):
    told = []
    return Apart(World(), at_most, lambda kind, **fields: told.append((kind, fields)), clock), told


def test_one_process_saves_by_its_clock():
    clock = Clock()
    apart, told = events_of(clock)
    due = []
    for second in range(200):
        clock.now = 1000.0 + second
        if apart.is_due(busy=False):
            due.append(second)
            apart.saved(0.1, 1.0)
    assert due == [60, 120, 180]
    assert told == [("interval", {"tier": "durable", "seconds": 60.0})]


def test_it_waits_for_an_older_save_and_says_once_that_the_newest_step_is_too_old():
    clock = Clock()
    apart, told = events_of(clock)
    clock.now += 1000  # compiles
    assert not apart.is_due(busy=False)
    clock.now += 81
    assert not apart.is_due(busy=True)
    assert told == []
    clock.now += 2
    assert not apart.is_due(busy=True)
    assert not apart.is_due(busy=True)
    assert [fields["detail"] for _, fields in told] == ["no durable step for 83 s; allowed are 82"]
    assert apart.is_due(busy=False)
    assert not apart.is_due(busy=False), "once"
    apart.saved(0.1, 1.0)
    clock.now += 90
    apart.is_due(busy=True)
    assert [kind for kind, _ in told] == ["alarm", "interval", "alarm"]


def test_a_full_disk_stops_nothing():
    def no_room(*_, **__):
        raise OSError("no room")

    clock = Clock()
    apart = Apart(World(), 1.0, no_room, clock)
    apart.is_due(busy=False)
    clock.now += 5
    assert apart.is_due(busy=False)
    apart.saved(0.1, 1.0)
    assert not apart.is_due(busy=False)


def test_fields_check_themselves():
    for fields, words in (({"every": -1}, "use auto, 0"), ({"apart": 0.0}, "positive number of seconds")):
        with pytest.raises(ConfigError, match=words):
            CheckpointConfig(**fields)


def train(folder, *flags):
    assert main(["train", str(NANO), "--run.dir", str(folder), "--checkpoint.keep", "99", *flags]) == 0
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] in ("sealed", "interval")]


def test_a_run_saves_by_time_and_a_short_one_only_at_its_end(tmp_path):
    events = train(tmp_path / "run", "--steps", "60", "--checkpoint.apart", "0.4")
    steps = [event["step"] for event in events if event["kind"] == "sealed"]
    assert steps == list_steps(tmp_path / "run" / "checkpoints")
    assert 2 <= len(steps) < 30
    assert steps[-1] == 60
    assert [event["seconds"] for event in events if event["kind"] == "interval"] == [0.4]
    assert [event["step"] for event in train(tmp_path / "short", "--steps", "5")] == [5]


def test_all_processes_of_a_world_save_at_one_step(tmp_path):
    """Else Orbax would wait for ever: only process 0 looks at its clock."""
    flags = ("--steps", "60", "--checkpoint.apart", "0.4", "--checkpoint.keep", "99")
    command = ["-m", "jaxscale", "train", str(NANO), "--run.dir", str(tmp_path / "run"), "--mesh.fsdp", "2", *flags]
    run_world([*command, "--distributed", "{distributed}"], 2, 1, timeout=180)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    steps = [event["step"] for event in map(json.loads, lines) if event["kind"] == "sealed"]
    assert steps == list_steps(tmp_path / "run" / "checkpoints")
    assert len(steps) >= 2
    assert steps[-1] == 60
