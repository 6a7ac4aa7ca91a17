"""Strikes come from faults and go with progress; nothing else changes them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.supervisor.budget import MEMORY, Account, Allowance, History, Mark

TEN = Allowance(2, steps=10, seconds=100)


def charged(history, mark, *, cause="signal", host="host-0", fingerprint="f"):
    return history.charged(mark, {cause: TEN}, [host], TEN, [fingerprint])


def test_strikes_add_up_without_progress():
    history = History()
    for expected in (1, 2, 3):
        history = charged(history, Mark(7, 1.0))
        assert history.cause_strikes("signal", Mark(7, 1.0), TEN) == expected
        assert history.host_strikes("host-0", Mark(7, 1.0), TEN) == expected
    assert history.cause_strikes("hang", Mark(7, 1.0), TEN) == 0
    assert history.host_strikes("host-1", Mark(7, 1.0), TEN) == 0


@pytest.mark.parametrize(("mark", "left"), [(Mark(9, 99), 2), (Mark(10, 0), 1), (Mark(0, 100), 1), (Mark(20, 0), 0)])
def test_steps_or_seconds_pay_strikes_back(mark, left):
    history = charged(charged(History(), Mark()), Mark())
    assert history.cause_strikes("signal", mark, TEN) == left
    assert history.host_strikes("host-0", mark, TEN) == left


def test_what_is_left_over_of_a_price_is_kept():
    history = History()
    for step in range(0, 60, 6):  # a fault every 6 steps, one paid back every 10
        history = charged(history, Mark(step))
    assert history.cause_strikes("signal", Mark(54), TEN) == 5


def test_a_fault_every_so_often_never_adds_up():
    history = History()
    for step in range(0, 6000, 11):
        assert history.cause_strikes("signal", Mark(step), TEN) <= 1
        history = charged(history, Mark(step))


def test_standing_idle_pays_nothing_back():
    account = Account(3, Mark(50, 20.0))
    assert account.at(Mark(50, 20.0), TEN) == account
    assert account.at(Mark(40, 10.0), TEN).strikes == 3  # a mark from before is no progress


def test_the_same_failure_is_recognised_until_training_gets_further():
    history = charged(History(), Mark(50))
    assert history.repeats("f", Mark(50)) == 1
    assert history.repeats("f", Mark(51)) == 0
    assert history.repeats("g", Mark(50)) == 0
    history = charged(history, Mark(50))
    assert history.repeats("f", Mark(50)) == 2
    assert charged(history, Mark(60)).repeats("f", Mark(60)) == 1


def test_old_fingerprints_make_room():
    history = History()
    for i in range(MEMORY + 10):
        history = charged(history, Mark(), fingerprint=f"f{i}")
    assert len(history.fingerprints) == MEMORY
    assert history.repeats("f0", Mark()) == 0
    assert history.repeats(f"f{MEMORY + 9}", Mark()) == 1


def test_a_repaired_host_starts_anew():
    history = charged(charged(History(), Mark()), Mark(), host="host-1")
    assert history.forgiven("host-0").hosts.keys() == {"host-1"}


def test_survives_json():
    history = charged(charged(History(), Mark(3, 1.5)), Mark(4, 2.5), cause="hang", host="host-1", fingerprint="g")
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history


@pytest.mark.parametrize("wrong", [(-1, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)])
def test_an_allowance_that_nothing_refills_is_refused(wrong):
    with pytest.raises(ValueError, match="strikes must be >= 0"):
        Allowance(*wrong)


@given(st.lists(st.tuples(st.integers(0, 8), st.floats(0, 90), st.booleans()), max_size=40))
def test_strikes_are_faults_less_what_progress_paid(moves):
    history, step, seconds, faults = History(), 0, 0.0, 0
    for steps, more, fault in moves:
        step, seconds = step + steps, seconds + more
        if fault:
            history, faults = charged(history, Mark(step, seconds)), faults + 1
        strikes = history.cause_strikes("signal", Mark(step, seconds), TEN)
        assert 0 <= strikes <= faults
        assert strikes >= faults - step // 10 - int(seconds // 100)
        assert strikes >= int(fault)
