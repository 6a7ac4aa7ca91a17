"""Which slots a host holds, and the best start that all hosts' slots together give."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.checkpoint.cover import Damaged, choice_from_json
from jaxscale.checkpoint.slot import ArrayInfo, SlotWriter
from jaxscale.supervisor.inventory import best_choice, copies_of, scan

JOB = "0123abcd"
ARRAYS = {"w": ArrayInfo((4,), "float32")}
LINEAGE = [(1, 0)]


def write_slot(path, host="host-0", step=10, epoch=1, box=(0, 2), job=JOB, seal=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = SlotWriter(path, job, host, int(host[-1]), ARRAYS, [("w", (box,))])
    writer.begin(epoch, step)
    writer.view(0)[:] = step
    if seal:
        writer.seal({"step": step})
    writer.close()


def cluster(tmp_path, step=10, epoch=1):
    """Two hosts that hold one half each, and a copy of the other's."""
    for mine, other, box, others in (("host-0", "host-1", (0, 2), (2, 4)), ("host-1", "host-0", (2, 4), (0, 2))):
        write_slot(tmp_path / mine / "own" / "gen-0", mine, step, epoch, box)
        write_slot(tmp_path / mine / "copies" / other / "gen-0", other, step, epoch, others)


def held(tmp_path, *hosts):
    """As it comes over the network."""
    return [(host, json.loads(json.dumps(entry))) for host in hosts for entry in scan(tmp_path / host, JOB)]


def test_own_slots_and_copies_are_found(tmp_path):
    cluster(tmp_path)
    found = scan(tmp_path / "host-0", JOB)
    assert {entry["file"] for entry in found} == {"own/gen-0", "copies/host-1/gen-0"}
    assert {entry["table"]["host"] for entry in found} == {"host-0", "host-1"}


@pytest.mark.parametrize("what", ["empty", "random", "unsealed", "other job", "cut", "folder", "partial"])
def test_what_is_no_slot_does_not_count_and_stops_nothing(tmp_path, what):
    write_slot(tmp_path / "own" / "gen-0")
    bad = tmp_path / "own" / ("gen-1" if what != "partial" else "gen-1.partial")
    if what == "unsealed":
        write_slot(bad, seal=False)
    elif what == "other job":
        write_slot(bad, job="ffff")
    elif what == "folder":
        bad.mkdir()
    elif what == "cut":
        write_slot(bad)
        bad.write_bytes(bad.read_bytes()[:-100])
    else:
        bad.write_bytes(b"" if what == "empty" else np.random.default_rng(0).bytes(10_000))
    found = scan(tmp_path, JOB)
    assert [entry["file"] for entry in found if entry["file"] != bad.name] == (
        ["own/gen-0"] if what != "partial" else [entry["file"] for entry in found]
    )
    assert "own/gen-0" in {entry["file"] for entry in found}
    assert best_choice([("host-0", entry) for entry in found], LINEAGE) is None  # one half is no state


def test_a_host_without_a_folder_holds_nothing(tmp_path):
    assert scan(tmp_path / "nowhere", JOB) == []


def test_a_host_that_is_lost_is_restored_from_the_copy(tmp_path):
    cluster(tmp_path)
    choice = best_choice(held(tmp_path, "host-1"), LINEAGE)
    assert choice["step"] == 10
    read = choice_from_json(json.loads(json.dumps(choice)))
    assert {location.holder for source in read.shards for location in source.locations} == {"host-1"}


def test_the_newest_complete_step_is_chosen(tmp_path):
    cluster(tmp_path)
    write_slot(tmp_path / "host-0" / "own" / "gen-1", "host-0", 20)  # host-1 never sealed it
    assert best_choice(held(tmp_path, "host-0", "host-1"), LINEAGE)["step"] == 10
    write_slot(tmp_path / "host-1" / "own" / "gen-1", "host-1", 20, box=(2, 4))
    assert best_choice(held(tmp_path, "host-0", "host-1"), LINEAGE)["step"] == 20


def test_what_a_later_epoch_left_behind_is_void(tmp_path):
    cluster(tmp_path, step=30)
    assert best_choice(held(tmp_path, "host-0", "host-1"), [(1, 0), (2, 20)]) is None
    assert best_choice(held(tmp_path, "host-0", "host-1"), [(1, 0), (2, 30)])["step"] == 30


def test_damage_that_was_found_is_avoided(tmp_path):
    cluster(tmp_path)
    damaged = {Damaged("host-0", "own/gen-0", 10, 1)}
    choice = choice_from_json(best_choice(held(tmp_path, "host-0", "host-1"), LINEAGE, damaged))
    first = next(source for source in choice.shards if source.box == ((0, 2),))
    assert [location.holder for location in first.locations] == ["host-1"]
    everywhere = damaged | {Damaged("host-1", "copies/host-0/gen-0", 10, 1)}
    assert best_choice(held(tmp_path, "host-0", "host-1"), LINEAGE, everywhere) is None


ENTRIES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["file", "table", "step"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.just("host-9"), ENTRIES), max_size=4))
def test_what_a_host_makes_up_counts_as_not_there(entries):
    assert copies_of(entries) == []
    assert best_choice(entries, LINEAGE) is None
