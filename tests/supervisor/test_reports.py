"""What agents say, as evidence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.checkpoint.assemble import NoGoodCopy
from jaxscale.supervisor import evidence as ev
from jaxscale.supervisor.commits import MemoryCommits
from jaxscale.supervisor.facts import Epoch, Host, World
from jaxscale.supervisor.reports import DAMAGED, evidence_of, rejection_of


def epoch_of(**more):
    world = World(("host-0", "host-1"), {"host-0": 0, "host-1": 1}, {"data": 2}, 2)
    return Epoch(3, world, 40, more.pop("choice", None), "host-0", MemoryCommits(world.members, 1), **more)


HOST = Host("host-1", 1, 1)


def test_a_killed_worker():
    message = {"code": None, "signal": 9, "fenced": False, "section": "data", "step": 50}
    found = evidence_of(epoch_of(), HOST, "worker_exit", message)
    assert found == ev.WorkerExit("host-1", 1, 3, None, 9, section="data", step=50)


def test_an_error_keeps_its_words():
    message = {"error_class": "ValueError", "text": "bad", "traceback": "Trace", "section": "step", "step": 50}
    found = evidence_of(epoch_of(), HOST, "error", message)
    assert found == ev.WorkerError("host-1", 1, 3, "ValueError", "bad", "Trace", "step", 50, collective=False)
    ended = evidence_of(epoch_of(), HOST, "worker_exit", {**message, "code": 1, "signal": None, "is_collective": True})
    assert (ended.error_class, ended.traceback, ended.collective, ended.exit_code) == ("ValueError", "Trace", True, 1)


@pytest.mark.parametrize("code", [0, 75])
def test_a_worker_that_did_its_work_is_no_fault(code):
    message = {"code": code, "signal": None, "said": "finished"}
    assert evidence_of(epoch_of(), HOST, "worker_exit", message) is None


@pytest.mark.parametrize("code", [0, 75])
def test_one_that_left_without_a_word_is(code):
    """`sys.exit(0)` in a recipe is no end of the training."""
    found = evidence_of(epoch_of(), HOST, "worker_exit", {"code": code, "signal": None})
    assert (type(found), found.exit_code) == (ev.WorkerExit, code)


def test_a_worker_that_finished_and_then_died_of_a_signal_is_a_fault():
    found = evidence_of(epoch_of(), HOST, "worker_exit", {"code": None, "signal": 11, "said": "finished"})
    assert found.signal == 11


def test_an_end_that_nobody_saw_counts_as_a_failure():
    found = evidence_of(epoch_of(), HOST, "worker_exit", {"code": None, "signal": None})
    assert (found.exit_code, found.signal) == (255, None)


def test_our_own_killing_is_marked():
    assert evidence_of(epoch_of(), HOST, "worker_exit", {"code": None, "signal": 9, "fenced": True}).fenced


def test_the_place_is_the_last_one_told_in_this_epoch():
    host = Host("host-1", 1, 1, progress={"epoch": 3, "section": "save", "step": 60})
    found = evidence_of(epoch_of(), host, "worker_exit", {"code": None, "signal": 9})
    assert (found.section, found.step) == ("save", 60)


def test_what_an_older_epochs_worker_was_doing_is_not_held_against_this_one():
    host = Host("host-1", 1, 1, progress={"epoch": 2, "section": "save", "step": 60})
    found = evidence_of(epoch_of(), host, "worker_exit", {"code": None, "signal": 9})
    assert (found.section, found.step) == (ev.START, 40)


def test_a_section_that_is_none_does_not_pass():
    found = evidence_of(epoch_of(), HOST, "worker_exit", {"code": 1, "signal": None, "section": "nonsense", "step": 1})
    assert found.section == ev.START


def test_the_service():
    died = {"code": None, "signal": 9}
    found = evidence_of(epoch_of(), HOST, "service_exit", died)
    assert found == ev.EpochHostLost("host-1", 3, None, 9)
    assert evidence_of(epoch_of(), HOST, "service_exit", {**died, "fenced": True}) is None
    assert evidence_of(epoch_of(ended={"host-0": 0}), HOST, "service_exit", died) is None


def test_a_worker_that_could_not_restore_names_no_guilty_host_but_a_shard():
    assert NoGoodCopy.__name__ == DAMAGED  # the name is all that comes from the worker
    message = {"error_class": DAMAGED, "text": "first\nembed [0:4] has no good copy", "code": 1, "signal": None}
    for kind in ("error", "worker_exit"):
        found = evidence_of(epoch_of(), HOST, kind, message)
        assert isinstance(found, ev.ShardRejected)
        assert (found.step, found.reason) == (40, "embed [0:4] has no good copy")
    assert evidence_of(epoch_of(), HOST, "error", {**message, "text": ""}).reason == ""


def test_a_rejected_shard_is_to_be_avoided_by_the_next_choice():
    message = {"holder": "host-0", "file": "own/gen-1", "path": "w", "box": [[0, 2], [4, 8]], "reason": "digest"}
    damaged, note = rejection_of(epoch_of(choice={"step": 40, "epoch": 2}), message)
    assert (damaged.holder, damaged.file, damaged.step, damaged.epoch) == ("host-0", "own/gen-1", 40, 2)
    assert (damaged.path, damaged.box) == ("w", ((0, 2), (4, 8)))
    assert note.kind == "rejected"
    assert note.fields["reason"] == "digest"


WORDS = st.one_of(st.none(), st.text(max_size=20), st.integers(), st.booleans())


@given(
    st.sampled_from(["worker_exit", "service_exit", "error"]),
    st.dictionaries(
        st.sampled_from(["error_class", "text", "traceback", "is_collective", "said", "fenced", "section"]), WORDS
    ),
    st.sampled_from([(None, None), (0, None), (1, None), (None, 9), (75, None)]),
    st.integers(0, 10**9),
)
def test_whatever_an_agent_says_the_evidence_can_be_kept_and_read_again(kind, words, end, step):
    message = {**words, "code": end[0], "signal": end[1], "step": step}
    found = evidence_of(epoch_of(), HOST, kind, message)
    if found is not None:
        assert ev.from_json(ev.to_json(found)) == found
