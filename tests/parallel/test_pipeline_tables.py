"""Pipeline schedules, without JAX: nothing before what it needs, bounded activations, bubbles of the closed form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.parallel.buffers import gradient_slots, input_slots, peak_live
from jaxscale.parallel.costs import (
    UNIT,
    OpCosts,
    asynchronous_cost,
    bubble,
    busy,
    closed_form,
    compare,
    lockstep_cost,
    make_table,
    partition,
)
from jaxscale.parallel.schedules import (
    SCHEDULES,
    Kind,
    Op,
    ScheduleError,
    forward_only,
    in_pairs,
    make_orders,
    one_at_a_time,
    pack,
)

BACKWARD = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


@st.composite
def sizes(draw, names=SCHEDULES):
    """(schedule, stages, microbatches, chunks) that go together."""
    name = draw(st.sampled_from(names))
    stages = draw(st.integers(1, 6))
    chunks = draw(st.integers(1, 4)) if name in ("interleaved", "gpipe") else 1
    if name == "interleaved":
        return name, stages, stages * draw(st.integers(1, 4)), chunks
    return name, stages, draw(st.integers(stages, 4 * stages + 3)), chunks


def tables(name, stages, microbatches, chunks):
    yield one_at_a_time(name, stages, microbatches, chunks)
    if name in ("1f1b", "interleaved"):
        yield in_pairs(name, stages, microbatches, chunks)


def check(table):
    """Every op once, on its stage, and nothing before what it needs. Written anew, without `needs`."""
    done, seen = {}, []
    for t, tick in enumerate(table.ticks):
        assert len(tick) == table.stages
        for s, work in enumerate(tick):
            assert [op.kind for op in work] == sorted({op.kind for op in work}), "one of each kind, forwards first"
            for op in work:
                assert op.chunk % table.stages == s
                seen.append(op)
                done[op] = t
    split = any(op.kind is Kind.BACKWARD_INPUT for op in seen)
    kinds = (Kind.FORWARD, *((Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if split else (Kind.BACKWARD,)))
    if table.name == "forward":
        kinds = (Kind.FORWARD,)
    depth = table.stages * table.chunks
    assert sorted(seen) == sorted(Op(k, q, m) for k in kinds for q in range(depth) for m in range(table.microbatches))
    for op, t in done.items():
        if op.kind is Kind.FORWARD and op.chunk:
            assert done[Op(Kind.FORWARD, op.chunk - 1, op.microbatch)] < t
        if op.kind in BACKWARD:
            assert done[Op(Kind.FORWARD, op.chunk, op.microbatch)] <= t
            if op.chunk < depth - 1:
                assert done[Op(op.kind, op.chunk + 1, op.microbatch)] < t
        if op.kind is Kind.BACKWARD_WEIGHT:
            assert done[Op(Kind.BACKWARD_INPUT, op.chunk, op.microbatch)] <= t


@given(sizes())
def test_nothing_happens_before_what_it_needs(size):
    for table in tables(*size):
        check(table)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 3))
def test_evaluation_goes_forward_only(stages, microbatches, chunks):
    table = forward_only(stages, microbatches, chunks)
    check(table)
    if microbatches % stages == 0:
        assert len(table.ticks) == microbatches * chunks + stages - 1


@given(sizes())
def test_the_bubble_of_unit_ops_is_the_closed_form(size):
    name, stages, microbatches, chunks = size
    if name == "gpipe" and chunks > 1 and microbatches % stages:
        return  # chunks of an incomplete group of microbatches wait for one another
    table = one_at_a_time(*size)
    costs = OpCosts(1.0, 1.0, 1.0) if name == "zero-bubble" else UNIT
    assert bubble(table, costs) == pytest.approx(closed_form(*size))
    if name != "zero-bubble":
        orders = make_orders(*size)
        assert asynchronous_cost(orders, UNIT, chunks) == pytest.approx(lockstep_cost(table, UNIT))


@pytest.mark.parametrize(
    ("name", "chunks", "expected"),
    [("gpipe", 1, 3 / 11), ("1f1b", 1, 3 / 11), ("interleaved", 2, 3 / 19), ("zero-bubble", 1, 3 / 27)],
)
def test_bubbles_of_four_stages_and_eight_microbatches(name, chunks, expected):
    assert closed_form(name, 4, 8, chunks) == pytest.approx(expected)


@given(sizes(("1f1b", "interleaved")), st.floats(0.5, 4.0), st.floats(0.5, 4.0))
def test_ticks_of_a_forward_and_a_backward_have_no_more_bubble_whatever_a_backward_costs(size, half, recompute):
    table = in_pairs(*size)
    assert bubble(table, OpCosts(1.0, half, half, recompute)) == pytest.approx(closed_form(*size))


@given(sizes())
def test_activations_are_bounded(size):
    name, stages, microbatches, chunks = size
    peaks = peak_live(one_at_a_time(*size))
    if name == "gpipe":
        assert peaks == (microbatches * chunks,) * stages
    elif name == "1f1b":
        assert peaks == tuple(stages - s for s in range(stages))
    elif name == "zero-bubble":
        assert max(peaks) == min(stages, microbatches), "as many as 1f1b keeps on its first stage"
    else:
        most = [2 * (stages - 1 - s) + (chunks - 1) * stages + 1 for s in range(stages)]
        assert all(peak <= bound for peak, bound in zip(peaks, most, strict=True))
    if name in ("1f1b", "interleaved"):
        pairs = peak_live(in_pairs(*size))
        assert all(pairs[s] <= 2 * (stages - 1 - s) + (chunks - 1) * stages + 1 for s in range(stages))


def test_activations_of_four_stages_and_eight_microbatches():
    assert peak_live(one_at_a_time("gpipe", 4, 8)) == (8, 8, 8, 8)
    assert peak_live(one_at_a_time("1f1b", 4, 8)) == (4, 3, 2, 1)
    assert peak_live(in_pairs("1f1b", 4, 8)) == (7, 5, 3, 1)
    assert peak_live(one_at_a_time("interleaved", 4, 8, 2)) == (11, 9, 7, 5)
    assert peak_live(one_at_a_time("zero-bubble", 4, 8)) == (4, 4, 4, 4)


# Costs


def test_a_tick_costs_its_slowest_stage():
    """Ticks that mix forwards and backwards cost backwards: with B = 2 F, 1f1b one by one costs more than gpipe."""
    costs = OpCosts(1.0, 1.0, 1.0)
    assert lockstep_cost(one_at_a_time("gpipe", 4, 8), costs) == 11 * 1 + 11 * 2
    assert lockstep_cost(one_at_a_time("1f1b", 4, 8), costs) > 33
    assert lockstep_cost(in_pairs("1f1b", 4, 8), costs) == 33
    assert lockstep_cost(make_table("1f1b", 4, 8, 1, costs), costs) == 33
    assert asynchronous_cost(make_orders("1f1b", 4, 8), costs) == 33
    assert lockstep_cost(make_table("zero-bubble", 4, 8, 1, costs), costs) == 27


@given(sizes(), st.floats(0.5, 3.0), st.floats(0.5, 3.0), st.floats(0.0, 1.0))
def test_no_schedule_is_faster_than_its_work(size, backward_input, backward_weight, recompute):
    costs = OpCosts(1.0, backward_input, backward_weight, recompute)
    table = make_table(*size, costs)
    name, stages, microbatches, chunks = size
    split = name == "zero-bubble"
    each = 1.0 + backward_input + backward_weight + recompute * (2 if split else 1)
    assert busy(table, costs) == pytest.approx(each * microbatches * stages)
    assert lockstep_cost(table, costs) >= each * microbatches * (1 - 1e-9)
    assert asynchronous_cost(make_orders(*size), costs, chunks) <= lockstep_cost(one_at_a_time(*size), costs) + 1e-6


def test_a_slow_stage_sets_the_pace():
    even, uneven = OpCosts(), OpCosts(shares=(1.0, 1.0, 1.0, 2.0))
    table = make_table("1f1b", 4, 8)
    assert lockstep_cost(table, uneven) > 1.5 * lockstep_cost(table, even)
    # Of two chunks a stage one alone is slow.
    table = make_table("interleaved", 2, 4, 2)
    slow = OpCosts(shares=(1.0, 1.0, 1.0, 3.0))
    assert busy(table, slow) == pytest.approx(1.5 * busy(table, OpCosts()))


def test_the_comparison_has_the_cheapest_first_and_leaves_out_what_cannot_be():
    found = compare(4, 8, (1, 2, 3), OpCosts(1.0, 1.0, 1.0))
    assert [choice.lockstep for choice in found] == sorted(choice.lockstep for choice in found)
    assert {(choice.name, choice.chunks) for choice in found} == {
        ("gpipe", 1),
        ("1f1b", 1),
        ("zero-bubble", 1),
        ("interleaved", 2),
        ("interleaved", 3),
    }
    assert "interleaved" not in {choice.name for choice in compare(4, 9, (1, 2), OpCosts())}


def test_recomputing_twice_makes_split_backwards_dear():
    kept = compare(4, 8, (1,), OpCosts(1.0, 1.0, 1.0))
    recomputed = compare(4, 8, (1,), OpCosts(1.0, 1.0, 1.0, recompute=1.0))
    assert kept[0].name == "zero-bubble"
    assert recomputed[0].name != "zero-bubble"


# Unequal stages


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=9), st.integers(1, 4), st.floats(0, 5), st.floats(0, 5))
def test_layers_are_divided_so_that_the_slowest_stage_is_as_fast_as_can_be(costs, stages, first, last):
    if len(costs) < stages:
        with pytest.raises(ScheduleError, match="some would have none"):
            partition(costs, stages, first, last)
        return

    def slowest(sizes):
        begin, found = 0, []
        for s, size in enumerate(sizes):
            extra = (first if s == 0 else 0) + (last if s == stages - 1 else 0)
            found.append(sum(costs[begin : begin + size]) + extra)
            begin += size
        return max(found)

    def all_divisions(layers, parts):
        if parts == 1:
            return [(layers,)]
        return [
            (size, *rest) for size in range(1, layers - parts + 2) for rest in all_divisions(layers - size, parts - 1)
        ]

    sizes = partition(costs, stages, first, last)
    assert len(sizes) == stages
    assert sum(sizes) == len(costs)
    assert min(sizes) > 0
    best = min(slowest(other) for other in all_divisions(len(costs), stages))
    assert slowest(sizes) == pytest.approx(best)


def test_a_heavy_head_takes_layers_from_the_last_stage():
    assert partition([1.0] * 8, 4) == (2, 2, 2, 2)
    assert partition([1.0] * 9, 4, last=2.0) == (2, 3, 3, 1)


# What waits


@given(sizes())
def test_nothing_lies_where_something_else_is_still_needed(size):
    for table in tables(*size):
        when = table.when()
        for slots, is_input in ((input_slots(table), True), (gradient_slots(table), False)):
            lives = {}
            for (chunk, microbatch), slot in slots.of.items():
                kinds = (Kind.FORWARD,) if is_input else BACKWARD
                neighbour = chunk - 1 if is_input else chunk + 1
                if not is_input and chunk == table.depth - 1:  # from the loss, in the tick of its own input's half
                    came = when[Op(Kind.BACKWARD_INPUT, chunk, microbatch)] - 1
                else:
                    came = next(when[op] for k in kinds if (op := Op(k, neighbour, microbatch)) in when)
                uses = [when[op] for k in Kind if (op := Op(k, chunk, microbatch)) in when]
                if not is_input:
                    uses = [
                        when[op] for k in Kind if k is not Kind.FORWARD and (op := Op(k, chunk, microbatch)) in when
                    ]
                assert slot < slots.count
                for tick in range(came + 1, max(uses) + 1):
                    place = (chunk % table.stages, slot, tick)
                    assert lives.setdefault(place, (chunk, microbatch)) == (chunk, microbatch)


def test_slots_are_as_many_as_things_live():
    """One more than the activations that a stage has begun: one may lie there a tick before it is used."""
    assert input_slots(one_at_a_time("1f1b", 4, 8)).count <= 4
    assert input_slots(one_at_a_time("1f1b", 4, 64)).count <= 4
    assert input_slots(in_pairs("1f1b", 4, 64)).count <= 7
    assert input_slots(one_at_a_time("gpipe", 4, 64)).count == 64
    assert gradient_slots(one_at_a_time("1f1b", 4, 64)).count <= 2


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe", 4, 8), "no pipeline schedule 'dualpipe'; schedules are gpipe, 1f1b"),
        (("1f1b", 4, 3), "3 microbatches for 4 stages: 1 of them would always wait; use 4 microbatches or more"),
        (("interleaved", 4, 10, 2), "10 is not a multiple of 4 stages; use 8 or 12, or the schedule 1f1b"),
        (("1f1b", 4, 8, 2), "the schedule 1f1b has one chunk a stage, not 2; interleaved has several"),
        (("gpipe", 0, 8), "are 1 or more"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        make_orders(*arguments)


def test_gpipe_has_no_ticks_in_pairs():
    with pytest.raises(ScheduleError, match="not gpipe"):
        in_pairs("gpipe", 4, 8)


def test_orders_that_wait_for_one_another_are_refused():
    forward, backward = Op(Kind.FORWARD, 0, 0), Op(Kind.BACKWARD, 0, 0)
    behind = (Op(Kind.FORWARD, 1, 0), Op(Kind.BACKWARD, 1, 0))
    with pytest.raises(ScheduleError, match="wait for one another"):
        pack([(backward, forward), behind])
    with pytest.raises(ScheduleError, match="wait for one another"):
        asynchronous_cost([(backward, forward), behind], UNIT)
