"""The ledger of a run: what the time went into, and that a hole in the log is seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.chaos.ledger import account, measure


def line(step, epoch, time, seconds=1.0, pause=0.0):
    return {"step": step, "epoch": epoch, "time": time, "step_seconds": seconds, "pause_seconds": pause}


def state(to, time):
    return {"kind": "state", "to": to, "time": time}


START = [{"kind": "coordinator_started", "time": 0.0}, state("FORMING", 1.0), state("RUNNING", 5.0)]
FAULT = [state("SUSPECT", 8.5), state("FENCING", 8.6), state("FORMING", 8.7), state("RUNNING", 10.0)]
END = [state("DRAINING", 13.0), state("DONE", 13.5), {"kind": "done", "time": 14.0}]
LINES = [line(1, 1, 5.0), line(2, 1, 6.0), line(3, 1, 7.0), line(4, 1, 8.0)]
AFTER = [line(4, 2, 10.0), line(5, 2, 11.0), line(6, 2, 12.0), line(7, 2, 13.0)]
COMMITTED = [*LINES[:3], *AFTER]


def test_a_fault_costs_the_time_without_a_step_and_the_lost_steps():
    ledger = account([*START, *FAULT, *END], [*LINES, *AFTER], COMMITTED)
    assert ledger.wall == 14.0
    assert ledger.trained == pytest.approx(5.0)  # steps 2, 3 and 5 to 7; a first step of an epoch counts as standing
    assert ledger.replayed == pytest.approx(1.0)
    assert ledger.standing == pytest.approx(8.0)
    assert ledger.unaccounted == pytest.approx(0.0)
    assert ledger.accounted == pytest.approx(1.0)
    assert ledger.effective == pytest.approx(5.0 / 8.0)


def test_nothing_is_filled_in():
    """Training that stands for longer than any detection may take, and nobody noticed."""
    late = [state("SUSPECT", 28.5), *({**e, "time": e["time"] + 20} for e in [*FAULT[1:], *END])]
    ledger = account([*START, *late], [*LINES, *({**x, "time": x["time"] + 20} for x in AFTER)], COMMITTED)
    assert ledger.unaccounted == pytest.approx(20.5)
    assert ledger.accounted == pytest.approx(13.5 / 34)


def test_a_gap_between_two_steps_is_no_step():
    lines = [line(1, 1, 5.0), line(2, 1, 7.0, seconds=0.5), line(3, 1, 8.0)]
    ledger = account([*START, state("DONE", 8.0)], lines, lines)
    assert (ledger.trained, ledger.unaccounted) == pytest.approx((1.5, 1.5))


def test_unless_it_says_what_it_was():
    lines = [line(1, 1, 5.0), line(2, 1, 7.0, seconds=0.5, pause=1.5), line(3, 1, 8.0)]
    ledger = account([*START, state("DONE", 8.0)], lines, lines)
    assert (ledger.trained, ledger.unaccounted, ledger.standing) == pytest.approx((1.5, 0.0, 6.5))
    assert ledger.effective == pytest.approx(0.5)


def test_an_undisturbed_run_is_effective():
    lines = [line(step, 1, 4.0 + step) for step in range(1, 10)]
    assert account([*START, state("DONE", 13.0)], lines, lines).effective == pytest.approx(1.0)


def test_empty_logs_are_refused():
    with pytest.raises(ValueError, match="there are 0 and 1"):
        account([], [line(1, 1, 1.0)], [])


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: (min(s), max(s))), max_size=12)


@given(spans, st.integers(0, 30), st.integers(30, 60))
def test_the_length_of_a_union_counts_each_second_once(found, begin, end):
    seconds = {second for a, b in found for second in range(a, b)} & set(range(begin, end))
    assert measure(found, (begin, end)) == len(seconds)
