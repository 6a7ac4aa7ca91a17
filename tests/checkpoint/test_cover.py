"""The choice of a step: the newest complete one, from any mix of slots, never across epochs."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.checkpoint import cover
from jaxscale.checkpoint.boxes import uncovered, whole
from jaxscale.checkpoint.cover import Copy, Damaged, choose, explain
from jaxscale.checkpoint.slot import ArrayInfo, Shard, SlotError, SlotTable

ARRAYS = {"w": ArrayInfo((8, 4), "float32"), "skipped": ArrayInfo((), "int32"), "empty": ArrayInfo((0, 2), "float32")}


def parts_of(rank, world=4):
    """What a host of a world holds: its rows of w; the scalar lies only at rank 0."""
    rows = 8 // world
    return [("w", ((rank * rows, rank * rows + rows), (0, 4)))] + ([("skipped", ())] if rank == 0 else [])


def table_of(rank, step, epoch, world=4, arrays=ARRAYS, digests="a"):
    shards = []
    for path, box in parts_of(rank, world):
        nbytes = 4 * math.prod(stop - start for start, stop in box)
        shards.append(Shard(path, box, 4096 + 64 * len(shards), nbytes, digests * 32))
    record = {"step": step, "metrics_line": {"loss": math.nan, "rank": rank}}
    return SlotTable("job", epoch, step, f"host-{rank}", rank, arrays, tuple(shards), record)


def own(rank, step, epoch=1, **changes):
    return Copy(f"host-{rank}", f"own/gen-{step % 2}", table_of(rank, step, epoch, **changes))


def copied(rank, holder, step, epoch=1, **changes):
    return Copy(f"host-{holder}", f"copies/host-{rank}/gen-{step % 2}", table_of(rank, step, epoch, **changes))


def places(choice, path, box):
    (source,) = [s for s in choice.shards if (s.path, s.box) == (path, box)]
    return [(location.holder, location.file) for location in source.locations]


LAST_ROWS = ((6, 8), (0, 4))


def test_the_newest_complete_step_is_chosen():
    copies = [own(rank, 4) for rank in range(4)] + [own(rank, 5) for rank in range(3)]
    choice = choose(copies, [(1, 0)])
    assert (choice.step, choice.epoch, choice.job) == (4, 1, "job")
    assert choice.arrays == ARRAYS
    assert choice.record["metrics_line"]["rank"] == 0
    assert len(choice.shards) == 5
    assert choose([*copies, copied(3, 1, 5)], [(1, 0)]).step == 5
    assert choose(copies[:3], [(1, 0)]) is None
    assert choose([], [(1, 0)]) is None


def test_a_missing_scalar_makes_a_step_incomplete():
    assert choose([own(rank, 4) for rank in (1, 2, 3)] + [copied(1, 2, 4)], []) is None


def test_the_owner_comes_first_and_every_location_is_there():
    copies = [copied(3, 1, 4), copied(3, 0, 4)] + [own(rank, 4) for rank in range(4)]
    choice = choose(copies, [])
    here = "copies/host-3/gen-0"
    assert places(choice, "w", LAST_ROWS) == [("host-3", "own/gen-0"), ("host-0", here), ("host-1", here)]
    for host, file in [("host-0", here), ("host-1", here), ("host-3", "own/gen-0")]:
        near = choice.seen_from(host)
        assert places(near, "w", LAST_ROWS)[0] == (host, file)
        assert sorted(places(near, "w", LAST_ROWS)) == sorted(places(choice, "w", LAST_ROWS))


def test_epochs_are_never_mixed():
    copies = [own(0, 4, 1), own(1, 4, 1), own(2, 4, 2), own(3, 4, 2)]
    assert choose(copies, [(1, 0), (2, 4)]) is None


def test_other_arrays_or_another_job_are_never_mixed():
    other = {**ARRAYS, "w": ArrayInfo((8, 4), "bfloat16")}
    copies = [own(rank, 4) for rank in range(3)]
    assert choose([*copies, own(3, 4, arrays=other)], []) is None
    assert choose([*copies, own(3, 4, arrays=other), copied(3, 0, 4)], []).arrays == ARRAYS


def test_of_one_step_in_two_epochs_the_later_counts():
    copies = [own(rank, 4, epoch) for epoch in (2, 1) for rank in range(4)]
    assert choose(copies, [(1, 0), (2, 4)]).epoch == 2
    assert choose(copies[:-4], []).epoch == 2


def test_what_a_later_epoch_left_behind_is_void():
    copies = [own(rank, 6, 1) for rank in range(4)] + [own(rank, 4, 1) for rank in range(4)]
    assert choose(copies, [(1, 0)]).step == 6
    assert choose(copies, [(1, 0), (2, 6)]).step == 6
    assert choose(copies, [(1, 0), (2, 4)]).step == 4
    assert choose(copies, [(1, 0), (2, 6), (3, 5)]).step == 4
    assert choose(copies, [(2, 3), (1, 0)]) is None
    newer = [own(rank, 5, 2) for rank in range(4)]
    assert choose(copies + newer, [(1, 0), (2, 4)]).step == 5


def test_another_layout_covers_as_well():
    """Two hosts of four were lost; the copies come from a world of two in the same epoch."""
    copies = [own(0, 4), own(1, 4), copied(1, 0, 4, world=2)]
    assert choose(copies, []).step == 4


def test_damage_takes_the_next_source_and_then_the_next_older_step():
    copies = [own(rank, step) for rank in range(4) for step in (4, 5)] + [copied(3, 1, 5)]
    file = "own/gen-1"
    shard = Damaged("host-3", file, 5, 1, "w", LAST_ROWS)
    choice = choose(copies, [], [shard])
    assert choice.step == 5
    assert places(choice, "w", LAST_ROWS) == [("host-1", "copies/host-3/gen-1")]
    assert choose(copies, [], [shard, Damaged("host-1", "copies/host-3/gen-1", 5, 1)]).step == 4
    other = [
        Damaged("host-3", file, 3, 1),
        Damaged("host-3", file, 5, 2),
        Damaged("host-2", file, 5, 1, "w", LAST_ROWS),
    ]
    assert len(places(choose(copies, [], other), "w", LAST_ROWS)) == 2, "damage of other steps, epochs, boxes"


def test_copies_that_disagree_are_not_locations_of_one_shard():
    copies = [own(rank, 4) for rank in range(4)] + [copied(3, 1, 4, digests="b"), copied(3, 2, 4, digests="b")]
    choice = choose(copies, [])
    (source,) = [s for s in choice.shards if s.box == LAST_ROWS]
    assert source.digest == "b" * 32
    assert {location.holder for location in source.locations} == {"host-1", "host-2"}
    damaged = [Damaged(holder, "copies/host-3/gen-0", 4, 1) for holder in ("host-1", "host-2")]
    (source,) = [s for s in choose(copies, [], damaged).shards if s.box == LAST_ROWS]
    assert source.digest == "a" * 32


def test_a_choice_survives_a_message():
    choice = choose([own(rank, 4) for rank in range(4)] + [copied(3, 1, 4)], [])
    text = json.dumps(cover.choice_to_json(choice), allow_nan=False)
    back = cover.choice_from_json(json.loads(text))
    assert math.isnan(back.record["metrics_line"]["loss"])
    assert cover.choice_to_json(back) == cover.choice_to_json(choice)
    assert (back.shards, back.arrays, back.step, back.epoch) == (choice.shards, choice.arrays, 4, 1)
    shard = back.shards[-1].at(back.shards[-1].locations[1])
    assert (shard.path, shard.box, shard.offset, shard.nbytes) == ("w", LAST_ROWS, 4096, 32)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("shards"),
        lambda c: c["shards"].append(3),
        lambda c: c["shards"][0].__setitem__(2, -1),
        lambda c: c["shards"][0][4][0].__setitem__(2, "x"),
        lambda c: c.__setitem__("step", "4"),
        lambda c: c.__setitem__("arrays", []),
    ],
)
def test_a_message_that_is_no_choice_is_refused(change):
    value = json.loads(json.dumps(cover.choice_to_json(choose([own(rank, 4) for rank in range(4)], []))))
    change(value)
    with pytest.raises(SlotError):
        cover.choice_from_json(value)
    with pytest.raises(SlotError):
        cover.choice_from_json([value])


def test_explain_names_array_range_and_hosts():
    copies = [own(rank, 4) for rank in range(4)] + [own(rank, 5) for rank in (1, 2)] + [own(0, 7)]
    damaged = [Damaged("host-0", "own/gen-0", 4, 1, "skipped", ())]
    assert explain(copies, [(1, 0), (2, 5)], ["host-4"], damaged) == [
        "step 7 of epoch 1 is void: epoch 2 started again from step 5",
        "step 5 of epoch 1 is incomplete: w [0:2, 0:4] is nowhere, and parts of 1 more of its 3 arrays; "
        "there are slots of host-1, host-2, none of host-0, host-3, host-4",
        "step 4 of epoch 1 is incomplete: skipped [] is nowhere; "
        "there are slots of host-0, host-1, host-2, host-3, none of host-4; damaged shards left out: 1",
    ]
    assert explain(copies[:4], []) == ["step 4 of epoch 1 is complete"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_choice_is_the_best_complete_state(draw):
    """Against a plain search: over all (step, epoch), is every array covered by what is there?"""
    slots = draw.draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)), max_size=30)
    )
    lineage = [(1, 0)] + [(epoch, draw.draw(st.integers(0, 4))) for epoch in (2, 3)]
    copies = [own(r, s, e) if r == h else copied(r, h, s, e) for r, h, s, e in slots]
    best = None
    for step, epoch in itertools.product((1, 2, 3), (1, 2, 3)):
        tables = [c.table for c in copies if (c.table.step, c.table.epoch) == (step, epoch)]
        held = [(s.path, s.box) for table in tables for s in table.shards]
        complete = all(uncovered(whole(i.shape), [b for p, b in held if p == n]) is None for n, i in ARRAYS.items())
        alive = all(start >= step for later, start in lineage if later > epoch)
        if complete and alive:
            best = max(best or (0, 0), (step, epoch))
    choice = choose(copies, lineage)
    assert (choice and (choice.step, choice.epoch)) == best
    if choice:
        files = {(c.holder, c.file, c.table.step, c.table.epoch) for c in copies}
        for source in choice.shards:
            assert source.locations
            assert all((x.holder, x.file, choice.step, choice.epoch) in files for x in source.locations)
