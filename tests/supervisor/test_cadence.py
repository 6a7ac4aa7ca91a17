"""How often to save into memory, from what it costs; and how the worker follows."""

import pytest
from histories import History
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.checkpoint.interval import AUTO
from jaxscale.checkpoint.memory import MemorySnapshots
from jaxscale.supervisor.cadence import (
    BLOCKED_SHARE,
    ENOUGH,
    FIRST_STEPS,
    LONGEST_SECONDS,
    NOTICE_SECONDS,
    NOTICEABLE,
    PRIOR_SECONDS,
    UNDECIDED,
    WINDOW,
    Cadence,
    Costs,
    choose,
    steps_between,
)
from jaxscale.supervisor.records import VerdictRecord, Verdicts

SECONDS = st.floats(1e-5, 100)


def costs(*blocked, failures=0):
    found = Costs(failures=failures)
    for step, seconds in enumerate(blocked):
        found = found.sealed({"step": step, "blocked_seconds": seconds})
    return found


# The number


def test_young_and_daly():
    assert steps_between(0.01, 0.5, 3600) == 17  # sqrt(2 * 0.01 * 3600) = 8.5 s
    assert steps_between(0.001, 0.1, 3600) == 27
    assert steps_between(0.001, 0.1, 36) == 3


def test_waiting_for_copies_stays_under_its_share_of_training():
    assert steps_between(0.1, 1.0, 10) == 20  # 1.4 s would be best, but a copy of 0.1 s fits every 20 s


def test_no_more_than_so_much_is_trained_twice_whatever_a_copy_costs():
    assert steps_between(5.0, 1.0, 3600) == 30
    assert steps_between(0.1, 0.7, 1e9) == 42


def test_a_step_that_takes_longer_than_all_that_is_saved_each_time():
    assert steps_between(1.0, 45.0, 3600) == 1


@given(SECONDS, SECONDS, st.floats(1, 1e7))
def test_the_bounds_hold_for_any_measurement(blocked, step, between):
    steps = steps_between(blocked, step, between)
    assert steps >= 1
    assert steps == 1 or steps * step <= LONGEST_SECONDS * (1 + 1e-9)
    if blocked / BLOCKED_SHARE <= LONGEST_SECONDS - step:
        assert blocked <= BLOCKED_SHARE * steps * step * (1 + 1e-9)


@given(SECONDS, SECONDS, st.floats(1, 1e6), st.floats(1, 10))
def test_more_failures_never_mean_fewer_checkpoints(blocked, step, between, factor):
    assert steps_between(blocked, step, between) <= steps_between(blocked, step, between * factor)


# What it is made from


def test_before_anything_failed_a_failure_an_hour_is_assumed():
    assert Costs().between_failures(0) == PRIOR_SECONDS
    assert Costs().failed().between_failures(1200) == (PRIOR_SECONDS + 1200) / 2
    assert Costs().between_failures(100_000) > Costs().failed().failed().between_failures(100_000)


def test_a_checkpoint_is_measured_once_and_only_the_newest_count():
    found = Costs()
    for _ in range(4):
        found = found.sealed({"step": 7, "blocked_seconds": 0.5})
    assert found.blocked == (0.5,)
    assert Costs().sealed({}) == Costs()
    assert costs(*range(10)).blocked == tuple(range(10 - WINDOW, 10))


def test_nothing_is_decided_before_enough_was_measured():
    steps = (0.1,) * 20
    assert choose(costs(*[0.001] * (ENOUGH - 1)), UNDECIDED, steps, 10, 50) is None
    assert choose(costs(*[0.001] * ENOUGH), UNDECIDED, steps[: ENOUGH - 1], 10, 50) is None
    assert choose(costs(*[0.001] * ENOUGH), UNDECIDED, steps, 10, 50) is not None


def test_one_slow_copy_and_one_slow_step_change_nothing():
    usual = choose(costs(0.001, 0.001, 0.001, 0.001, 0.001), UNDECIDED, (0.1,) * 9, 10, 50)
    hiccup = choose(costs(3.0, 0.001, 0.001, 0.001, 0.001), UNDECIDED, (*(0.1,) * 8, 60.0), 10, 50)
    assert hiccup == usual


def test_it_holds_from_a_step_on_that_no_worker_has_reached_when_it_hears_of_it():
    choice = choose(costs(*[0.001] * ENOUGH), UNDECIDED, (0.1,) * 9, 10, 50)
    assert choice.cadence.since >= 50 + NOTICE_SECONDS / 0.1
    slow = choose(costs(*[0.001] * ENOUGH), UNDECIDED, (20.0,) * 9, 10, 50)
    assert slow.cadence.since >= 52


def test_a_little_more_or_less_is_no_reason_to_change():
    steps = (0.1,) * 9
    first = choose(costs(*[0.001] * ENOUGH), UNDECIDED, steps, 0, 50)
    assert choose(costs(*[0.0012] * WINDOW), first.cadence, steps, 0, 500) is None
    assert choose(costs(*[0.004] * WINDOW), first.cadence, steps, 0, 500).cadence.every == 2 * first.cadence.every


def test_nothing_new_is_decided_before_the_last_decision_holds():
    first = choose(costs(*[0.001] * ENOUGH), UNDECIDED, (0.1,) * 9, 0, 50)
    assert choose(costs(*[0.1] * WINDOW), first.cadence, (0.1,) * 9, 0, first.cadence.since - 1) is None
    assert choose(costs(*[0.1] * WINDOW), first.cadence, (0.1,) * 9, 0, first.cadence.since) is not None


def test_the_first_decision_is_told_even_where_the_run_began_with_the_same_number():
    """After a takeover nobody knows what the workers do."""
    first = choose(costs(*[0.0025] * ENOUGH, failures=99), UNDECIDED, (0.1,) * 9, 0, 50)
    assert first.cadence.every == FIRST_STEPS


def test_an_event_tells_the_decision_and_why():
    fields = choose(costs(*[0.001] * ENOUGH), UNDECIDED, (0.1,) * 9, 0, 50).fields()
    assert fields == {
        "every": 27,
        "since": 70,
        "blocked_seconds": 0.001,
        "step_seconds": 0.1,
        "failure_seconds": 3600.0,
    }


# The worker


class Told:
    """What the agent's record says, as the test sets it."""

    def __init__(self):
        self.cadence = (-1, 0)
        self.looks = 0

    def __call__(self):
        self.looks += 1
        return self.cadence


def worker(tmp_path, told, every=FIRST_STEPS):
    who = {"job": "job", "host": "host-0", "rank": 0, "epoch": 1, "generations": 2}
    talk = {"verdicts": lambda: (-1, -1), "notify": lambda *_: None}
    return MemorySnapshots(tmp_path / "own", every=every, cadence=told, **who, **talk)


def test_a_worker_goes_on_as_it_does_until_the_step_has_come(tmp_path):
    told = Told()
    snapshots = worker(tmp_path, told)
    assert [step for step in range(1, 13) if snapshots.wants(step)] == [5, 10]
    told.cadence = (22, 7)
    assert [step for step in range(13, 45) if snapshots.wants(step)] == [15, 20, 22, 29, 36, 43]
    told.cadence = (-1, 0)  # an agent that was started again has nothing to say yet
    assert [step for step in range(45, 60) if snapshots.wants(step)] == [50, 57]


def test_workers_that_hear_of_it_at_different_steps_save_the_same_steps(tmp_path):
    saved = []
    for heard in (3, 11, 21):
        told = Told()
        snapshots = worker(tmp_path, told)
        saved.append([])
        for step in range(1, 60):
            if step == heard:
                told.cadence = (22, 9)
            if snapshots.wants(step):
                saved[-1].append(step)
    assert saved[0] == saved[1] == saved[2] == [5, 10, 15, 20, 22, 31, 40, 49, 58]


def test_one_that_hears_of_it_late_soon_saves_the_same_steps_again(tmp_path):
    told = Told()
    snapshots = worker(tmp_path, told)
    assert [step for step in range(1, 30) if snapshots.wants(step)][-1] == 25
    told.cadence = (22, 9)
    assert [step for step in range(30, 60) if snapshots.wants(step)] == [31, 40, 49, 58]


def test_a_worker_says_the_same_of_a_step_however_often_it_is_asked(tmp_path):
    told = Told()
    snapshots = worker(tmp_path, told)
    assert snapshots.wants(10)
    told.cadence = (9, 4)
    assert snapshots.wants(10)
    assert told.looks == 1
    assert not snapshots.wants(11)


def test_a_recipe_without_memory_checkpoints_never_looks(tmp_path):
    told = Told()
    told.cadence = (1, 1)
    assert not any(worker(tmp_path, told, every=0).wants(step) for step in range(10))
    assert told.looks == 0


def test_the_record_carries_the_cadence(tmp_path):
    record = VerdictRecord(tmp_path / "verdicts", create=True)
    reader = VerdictRecord(tmp_path / "verdicts")
    for verdicts in (Verdicts(1, 2), Verdicts(1, 2, 30, 7), Verdicts(2**40, 2**40, 2**40, 2**40)):
        record.write(verdicts)
        assert reader.read() == verdicts
    record.close()
    reader.close()


def test_undecided_is_no_cadence():
    assert Cadence() == UNDECIDED
    with pytest.raises(AttributeError):
        UNDECIDED.every = 3


# The coordinator


def decided(history):
    return [note.fields for note in history.notes if note.kind == "cadence"]


def test_the_coordinator_begins_with_few_steps_and_then_takes_what_copies_cost():
    """Copies of 10 ms and steps of 0.1 s: every 2 s at least, sqrt(2 * 0.01 * 3600) = 8.5 s is best."""
    history = History(every=AUTO).until_running(1)
    assert {order["every"] for _, order in history.orders("work")} == {FIRST_STEPS}
    history.run(30)
    (choice,) = decided(history)
    assert 85 <= choice["every"] <= 86
    assert (choice["blocked_seconds"], choice["step_seconds"]) == (0.01, 0.1)
    told = {(host, m["since"], m["every"]) for host, m in history.orders("verdict") if m["every"]}
    assert told == {(host, choice["since"], choice["every"]) for host in history.members}
    sealed = [note.fields["step"] for note in history.notes if note.kind == "sealed"]
    assert all(step % FIRST_STEPS == 0 for step in sealed if step < choice["since"])
    assert {(step - choice["since"]) % choice["every"] for step in sealed if step >= choice["since"]} == {0}
    assert choice["since"] in sealed


def test_a_decision_is_told_at_once():
    history = History(every=AUTO).until_running(1)
    while not decided(history):
        history.run(0.01)
    assert {host for host, m in history.orders("verdict") if m["every"]} == set(history.members)


def test_the_next_epoch_goes_on_with_the_cadence_of_the_one_before():
    history = History(every=AUTO).until_running(1).run(30)
    (choice,) = decided(history)
    history.kill_worker("host-1")
    history.until_running(2)
    assert {order["every"] for _, order in history.orders("work", epoch=2)} == {choice["every"]}
    before_work = history.told[: history.told.index(history.orders("work", epoch=2)[0])]
    last = {host: (m["since"], m["every"]) for host, m in before_work if m["do"] == "verdict"}
    assert set(last.values()) == {(choice["since"], choice["every"])}, "a host that is new must save the same steps"


def test_failures_make_checkpoints_more_frequent():
    history = History(every=AUTO).until_running(1).run(30)
    for epoch in range(2, 6):
        history.kill_worker(history.members[0])
        history.until_running(epoch).run(60)
    every = [choice["every"] for choice in decided(history)]
    assert every == sorted(every, reverse=True)
    assert len(every) > 1
    assert every[-1] <= every[0] / NOTICEABLE


def test_a_number_in_the_recipe_stays():
    history = History(every=10).until_running(1).run(60)
    assert decided(history) == []
    assert {(m["since"], m["every"]) for _, m in history.orders("verdict")} == {(-1, 0)}
    assert {order["every"] for _, order in history.orders("work")} == {10}
