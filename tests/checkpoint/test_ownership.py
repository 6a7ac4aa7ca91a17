"""Whose a run is: a second job is refused, an old one that comes back commits nothing."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.checkpoint import owner as owners
from jaxscale.checkpoint.owner import OWNER, Owner, Ownership, OwnershipLost, RunOwned, check_job, this_process
from jaxscale.storage.local_store import LocalStore

FIELDS = [field.name for field in dataclasses.fields(Owner)]


def encoded(value):
    return json.dumps(value).encode()


def at(store, job, **fields):
    """A job's view of a place, as of a process on another machine."""
    me = dataclasses.replace(this_process("lm", job), process=f"boot-{job} pid:1 7 1", host=f"host-{job}")
    return Ownership(store, dataclasses.replace(me, **fields))


def test_a_second_job_is_refused_while_the_first_one_writes(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    first, second = at(store, "a"), at(store, "b")
    first.take(1)
    monkeypatch.setattr(owners, "LOOK_SECONDS", 0.0)
    now = [0.0]

    def sleep(_):
        now[0] += 1
        first.hold()

    with pytest.raises(RunOwned, match="job a, generation 1"):
        second.wait_until_free(lambda: now[0], sleep)
    first.release()
    second.take(1)
    assert second.generation == 2, "it grows"


def test_an_old_owner_that_comes_back_is_refused_at_its_commit(tmp_path):
    store = LocalStore(tmp_path)
    old, new = at(store, "a"), at(store, "b")
    old.take(1)
    record = json.loads((tmp_path / OWNER).read_bytes())
    (tmp_path / OWNER).write_text(json.dumps({**record, "time": record["time"] - owners.LEASE_SECONDS - 1}))
    new.take(1)
    check_job(store, "b")
    for refused in (old.check, old.hold, lambda: check_job(store, "a")):
        with pytest.raises(OwnershipLost, match=r"job b, generation 2|job b"):
            refused()
    old.release()
    new.check()


def test_who_gave_a_place_back_does_not_take_it_again_by_a_late_look(tmp_path):
    store = LocalStore(tmp_path)
    first = at(store, "a")
    first.take(1)
    first.release()
    for late in (first.hold, first.check, first.check_now_and_then):
        with pytest.raises(OwnershipLost, match="given the run"):
            late()
    assert first.look().released


def test_another_coordinator_of_one_job_takes_over_at_once_and_the_old_one_has_lost(tmp_path):
    store = LocalStore(tmp_path)
    before, after = at(store, "a"), at(store, "a", process="boot-z pid:1 9 1")
    before.take(1)
    after.take(1)
    with pytest.raises(OwnershipLost) as lost:
        before.check()
    assert (lost.value.job, after.generation) == ("a", 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": 1}', "a93be2defb51"])
def test_a_record_that_makes_no_sense_is_refused(tmp_path, text):
    (tmp_path / OWNER).write_text(text)
    with pytest.raises(RunOwned, match="cannot be understood"):
        at(LocalStore(tmp_path), "a").take(1)


def test_on_one_machine_it_is_known_at_once_whether_the_owner_lives(tmp_path):
    """Its record is old, as that of a job that was stopped for a while; its process says more than that."""
    store = LocalStore(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        theirs = this_process("lm", "a")
        theirs = dataclasses.replace(theirs, pid=child.pid, process=owners._identity(child.pid), time=0.0, generation=4)
        store.write(OWNER, theirs.encode())
        mine = Ownership(store, this_process("lm", "b"))
        with pytest.raises(RunOwned, match=rf"job a, generation 4, pid {child.pid}"):
            mine.take(1)
        child.kill()
        child.wait()
        store.write(OWNER, dataclasses.replace(theirs, time=time.time() + 60).encode())
        mine.take(1)  # it need not wait for the lease to end
    assert mine.generation == 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.binary(max_size=20) | st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=7).map(encoded))
def test_whatever_lies_there_is_understood_or_refused(tmp_path_factory, data):
    store = LocalStore(tmp_path_factory.mktemp("place"))
    store.write(OWNER, data)
    for ask in (at(store, "b").look, lambda: check_job(store, "b")):
        try:
            ask()
        except (RunOwned, OwnershipLost) as error:
            said = str(error)
        else:
            said = OWNER
        assert OWNER in said or "belongs to" in said


def test_a_place_of_another_recipe_is_refused(tmp_path):
    at(LocalStore(tmp_path), "a").take(1)
    with pytest.raises(RunOwned, match="another recipe"):
        at(LocalStore(tmp_path), "a", run="dlrm").take(1)
