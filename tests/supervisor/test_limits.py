"""How long a section may take, and who is suspected when a world stands still."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.supervisor.evidence import SECTIONS
from jaxscale.supervisor.limits import (
    BOUNDS,
    ORDER,
    Bounds,
    Kind,
    LimitConfig,
    Pace,
    Position,
    odd_ones,
    percentile,
    suspects,
)

STEP = Kind("step", "program", 4)
DATA = Kind("data", "", 4)


def pace_of(kind, durations, config=None):
    pace = Pace(config or LimitConfig())
    for seconds in durations:
        pace = pace.learned(kind, seconds)
    return pace


@pytest.mark.parametrize("section", SECTIONS)
def test_generous_before_there_is_history(section):
    kind = Kind(section)
    assert Pace().limit(kind) == BOUNDS[section].first
    almost = pace_of(kind, [0.001] * (BOUNDS[section].enough - 1))
    assert almost.limit(kind) == BOUNDS[section].first
    assert almost.learned(kind, 0.001).limit(kind) == BOUNDS[section].floor


def test_the_step_floor_is_one_second_and_slower_steps_get_more():
    assert pace_of(STEP, [0.05] * 50).limit(STEP) == 1.0
    assert pace_of(STEP, [0.4] * 50).limit(STEP) == pytest.approx(5 * 0.4)
    assert pace_of(STEP, [1000.0] * 50).limit(STEP) == BOUNDS["step"].ceiling


def test_one_outlier_changes_nothing_two_kinds_of_steps_do():
    steady = [0.3] * 40
    assert pace_of(STEP, [*steady, 60.0]).limit(STEP) == pace_of(STEP, steady).limit(STEP)
    every_tenth = [0.9 if i % 10 == 0 else 0.3 for i in range(100)]
    assert pace_of(STEP, every_tenth).limit(STEP) == pytest.approx(5 * 0.9)


def test_old_durations_are_forgotten():
    pace = pace_of(STEP, [5.0] * 10 + [0.4] * LimitConfig().window)
    assert pace.limit(STEP) == pytest.approx(2.0)
    assert len(pace.durations[STEP]) == LimitConfig().window


def test_nothing_is_learned_from_what_ended_in_a_fault():
    pace = pace_of(STEP, [0.4] * 20)
    for _ in range(50):
        pace = pace.learned(STEP, 30.0, fault=True)
    assert pace == pace_of(STEP, [0.4] * 20)
    assert pace.learned(STEP, float("nan")) is pace
    assert pace.learned(STEP, -1.0) is pace


def test_programs_worlds_and_first_steps_are_apart():
    pace = pace_of(STEP, [0.1] * 20)
    for other in (
        dataclasses.replace(STEP, program="another"),
        dataclasses.replace(STEP, world=3),
        dataclasses.replace(STEP, first=True),
        dataclasses.replace(STEP, section="evaluate"),
    ):
        assert pace.limit(other) == BOUNDS[other.section].first
    first = dataclasses.replace(STEP, first=True)
    # A first step loads its program and waits for slower peers: it keeps more room than a usual one.
    assert pace_of(first, [0.1] * 20).limit(first) == 10.0


def test_overdue_counts_from_the_limit():
    pace = pace_of(STEP, [0.1] * 20)
    assert pace.overdue(STEP, 100.0, 101.0) is None
    assert pace.overdue(STEP, 100.0, 101.25) == pytest.approx(0.25)


@given(st.sampled_from(SECTIONS), st.lists(st.floats(0, 1e5), max_size=40), st.booleans())
def test_a_limit_stays_between_floor_and_ceiling(section, durations, first):
    kind = Kind(section, first=first)
    bounds = BOUNDS[section]
    assert bounds.floor <= pace_of(kind, durations).limit(kind) <= max(bounds.ceiling, bounds.first)


def test_survives_json():
    pace = pace_of(STEP, [0.1, 0.2]).learned(DATA, 0.5)
    assert Pace.from_json(json.loads(json.dumps(pace.to_json()))) == pace


def test_every_section_has_bounds_and_a_place():
    assert set(BOUNDS) == set(SECTIONS) == set(ORDER)
    with pytest.raises(ValueError, match="no bounds for the sections start, restore"):
        LimitConfig(bounds={"step": Bounds(1, 2, 3)})


def test_percentile_is_the_nearest_rank():
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([7.0], 0.99) == 7.0


# Who hangs

LEARNED = pace_of(STEP, [0.1] * 20)
for _ in range(20):
    LEARNED = LEARNED.learned(DATA, 0.1)


def world(*places, entered=0.0):
    """Workers at (section, step)."""
    return [
        Position(f"host-{i}", Kind(section, "program" if section == "step" else "", 4), step, entered, i)
        for i, (section, step) in enumerate(places)
    ]


def names(found):
    return [position.host for position in found]


def test_nobody_is_suspected_before_its_time():
    positions = world(("step", 5), ("step", 5), ("step", 4), ("step", 5))
    assert suspects(positions, LEARNED, 0.9) == ()
    assert names(suspects(positions, LEARNED, 1.1)) == ["host-2"]


def test_all_are_suspected_where_nothing_tells_them_apart():
    positions = world(("step", 5), ("step", 5), ("step", 5))
    assert names(suspects(positions, LEARNED, 2.0)) == ["host-0", "host-1", "host-2"]


def test_one_that_entered_a_moment_later_is_no_less_a_suspect():
    first, second = world(("step", 5), ("step", 5))
    assert names(suspects([first, dataclasses.replace(second, entered=0.2)], LEARNED, 1.1)) == ["host-0", "host-1"]
    assert names(suspects([first, dataclasses.replace(second, entered=2.0)], LEARNED, 1.1)) == ["host-0"]


def test_those_who_wait_for_a_hung_loader_are_innocent():
    positions = world(("step", 5), ("data", 5), ("step", 5), ("step", 5))
    # In `data` there is time up to 2 s: until then the others' waiting is explained.
    assert suspects(positions, LEARNED, 1.5) == ()
    assert names(suspects(positions, LEARNED, 2.1)) == ["host-1"]


def test_one_that_hangs_in_work_of_its_own_is_named_wherever_the_others_are():
    positions = world(("data", 6), ("step", 5), ("step", 4))
    assert names(suspects(positions, LEARNED, 2.1)) == ["host-0"]


@pytest.mark.parametrize("section", ["compile", "save", "evaluate", "restore", "start"])
def test_waiting_for_one_that_has_time_left_is_no_hang(section):
    positions = world(("step", 5), ("step", 5), (section, 5))
    assert suspects(positions, LEARNED, 4.0) == ()
    limit = LEARNED.limit(Kind(section, "", 4))
    assert names(suspects(positions, LEARNED, limit + 1)) == ["host-2"]


def test_one_that_left_the_others_behind_is_the_odd_one():
    assert names(odd_ones(world(("step", 5), ("step", 5), ("step", 6), ("step", 5)))) == ["host-2"]
    assert names(odd_ones(world(("step", 5), ("step", 6)))) == ["host-0"]
    assert names(odd_ones(world(("step", 5), ("step", 5), ("step", 6), ("step", 4)))) == ["host-3"]


def test_the_order_of_sections_is_that_of_the_loop():
    # After 6 updates a worker saves, then fetches data, then steps, all with the number 6.
    assert names(odd_ones(world(("save", 6), ("data", 6), ("step", 6)))) == ["host-0"]
    assert names(odd_ones(world(("step", 5), ("save", 6), ("save", 6)))) == ["host-0"]


PLACES = st.lists(st.tuples(st.sampled_from(SECTIONS), st.integers(0, 3)), min_size=1, max_size=6)


@given(PLACES, st.floats(0, 1e5))
def test_whoever_is_suspected_is_overdue_and_a_world_never_stands_still_forever(places, now):
    positions = world(*places)
    found = suspects(positions, LEARNED, now)
    assert all(LEARNED.overdue(p.kind, p.entered, now) is not None for p in found)
    assert suspects(positions, LEARNED, 1e6)


def test_a_process_that_is_stopped_hangs_though_all_of_them_wait_in_the_same_step():
    places = [Position(f"host-{i}", Kind("step"), 7, 0.0, i, stopped=i == 2) for i in range(4)]
    assert [p.host for p in suspects(places, Pace(), 1e6)] == ["host-2"]
