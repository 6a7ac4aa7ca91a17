"""Whole histories of faults, without a process: what the coordinator's mind does about each report."""

import dataclasses

import histories
import pytest
from histories import History, ScriptedJudge, table_judge
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.supervisor import evidence as ev
from jaxscale.supervisor.facts import LEASE_SECONDS, Settings, Verdict
from jaxscale.supervisor.limits import Kind
from jaxscale.supervisor.states import DEADLINES, HANDOVER_SECONDS, State
from jaxscale.supervisor.transitions import COPIES_SECONDS, GROW_SECONDS, STOPPED, WINDOW_SECONDS

FOUR = ("host-0", "host-1", "host-2", "host-3")
START = ["DECIDING", "FORMING", "RESTORING", "WARMING", "RUNNING"]
AGAIN = ["SUSPECT", "FENCING", "DECIDING", "FORMING", "RESTORING", "WARMING", "RUNNING"]


def running(**more):
    """A run of four hosts that trains, under the table's judge unless another is given."""
    more.setdefault("judge", table_judge())
    return History(**more).until_running(1).run(2.0)


def before_service(**more):
    """A run in FORMING, whose service does not listen yet."""
    history = History(come=False, **more)
    history.hosts["host-0"].deaf = {"serve"}
    for name in FOUR:
        history.connect(name)
    assert history.state is State.FORMING
    return history


def listening(history):
    history.say("host-0", "service", epoch=history.machine.number, address="127.0.0.1:1")


# From the start to the end


def test_four_hosts_start_and_train_to_the_end():
    history = History(judge=table_judge(), steps=40).run(30)
    assert history.finish is not None
    assert (history.finish.code, history.finish.text) == (0, "")
    assert history.states() == [*START, "DONE"]
    assert [(h, m["rank"]) for h, m in history.orders("work")] == [(name, i) for i, name in enumerate(FOUR)]
    assert [h for h, _ in history.orders("end")] == list(FOUR)
    assert [m["code"] for _, m in history.orders("end")] == [0] * 4
    assert history.notes[-1].kind == "done"


def test_nothing_starts_before_all_hosts_are_there():
    history = History(judge=table_judge(), come=False)
    for name in FOUR[:3]:
        history.connect(name)
    assert history.run(3).state is State.WAITING
    history.hosts["host-3"].ready = False
    history.connect("host-3")
    assert history.run(3).state is State.WAITING  # its zygote imports
    history.say("host-3", "ready", pid=1)
    assert history.state is not State.WAITING


def test_workers_are_told_to_start_only_when_the_service_listens():
    history = before_service()
    assert not history.orders("work")
    listening(history)
    assert {h for h, _ in history.orders("work", epoch=1)} == set(FOUR)
    assert {m["address"] for _, m in history.orders("work")} == {"127.0.0.1:1"}


def test_the_epoch_goes_on_from_what_the_run_directory_knows():
    assert History(epoch=7).machine.number == 8


def test_commits_are_told_to_all_members_and_never_go_back():
    history = running().run(5)
    told = [m for _, m in history.orders("verdict")]
    assert told[-1]["committed"] == history.trained > 0
    for name in FOUR:
        steps = [(m["committed"], m["decided"]) for h, m in history.orders("verdict") if h == name]
        assert steps == sorted(steps)
        assert steps[-1][0] == history.trained


# A worker dies


def test_a_killed_worker_costs_one_epoch_and_nothing_else():
    history = running()
    kept = history.machine.epoch.commits.committed
    history.kill_worker("host-2")
    assert history.state is not State.RUNNING
    history.until_running(2)
    assert history.states() == [*START, *AGAIN]
    assert history.members == FOUR
    (fault,) = history.faults()
    assert (fault["class"], fault["host"]) == ("recoverable", "host-2")
    assert "SIGKILL" in fault["cause"]
    assert {m["choice"]["step"] for _, m in history.orders("work", epoch=2)} == {kept}
    assert history.machine.epoch.start_step == kept > 0


def test_members_are_fenced_before_anything_new_starts():
    history = running()
    history.hosts["host-3"].deaf = {"fence"}
    history.kill_worker("host-2")
    history.run(WINDOW_SECONDS + 1)
    assert {h for h, _ in history.orders("fence", epoch=1)} == set(FOUR)
    assert history.state is State.FENCING
    assert not history.orders("serve", epoch=2)
    history.hosts["host-3"].worker = None
    history.say("host-3", "fenced", epoch=1, copies=[])
    assert history.orders("serve", epoch=2)


def test_all_are_fenced_at_the_first_word_of_a_fault():
    history = running()
    for fake in history.hosts.values():
        fake.deaf = {"fence"}
    history.say("host-1", "error", epoch=1, pid=1, error_class="X", text="Gloo all-reduce failed", is_collective=True)
    assert {h for h, _ in history.orders("fence", epoch=1)} == set(FOUR)
    assert history.state is State.SUSPECT


def test_evidence_is_gathered_while_someone_is_not_fenced():
    history = running(judge=ScriptedJudge(4))
    for fake in history.hosts.values():
        fake.deaf = {"fence"}
    words = {"is_collective": True, "text": "Gloo", "error_class": "JaxRuntimeError"}
    history.say("host-1", "error", epoch=1, pid=1, **words)
    history.kill_worker("host-2")
    history.run(WINDOW_SECONDS + 0.5)
    history.kill_worker("host-3", signal=11)
    assert not history.judge.judged
    for name in FOUR:
        history.say(name, "fenced", epoch=1, copies=[])
    (judged,) = history.judge.judged
    assert [(type(e), e.host) for e in judged] == [
        (ev.WorkerError, "host-1"),
        (ev.WorkerExit, "host-2"),
        (ev.WorkerExit, "host-3"),
    ]


def test_victims_are_never_charged():
    """One is killed, the collective of the others fails, and what is left is killed by ourselves."""
    history = running()
    for name in FOUR:
        history.hosts[name].deaf = {"fence"}
    history.kill_worker("host-2")
    for name in ("host-0", "host-1"):
        history.raise_in_worker(name, "JaxRuntimeError", "Gloo all-reduce failed: Connection reset", is_collective=True)
    history.hosts["host-3"].worker = None
    history.say("host-3", "worker_exit", epoch=1, code=None, signal=9, fenced=True)
    for name in FOUR:
        history.hosts[name].deaf = set()
        history.say(name, "fenced", epoch=1, copies=[])
    history.until_running(2)
    (fault,) = history.faults()
    assert fault["host"] == "host-2"
    assert list(history.judge.to_json()["history"]["hosts"]) == ["host-2"]
    assert len(fault["evidence"]) >= 4  # all of it is kept


def test_messages_of_an_old_epoch_change_nothing():
    history = running()
    history.kill_worker("host-2")
    history.until_running(2)
    before = (history.states(), len(history.told), history.machine.epoch.commits.decided)
    place = {"step": 99, "section": "step", "seconds": 900.0, "finished": False, "took": [["step", 900.0, False]]}
    for name in FOUR:
        history.say(name, "worker_exit", epoch=1, code=1, signal=None, fenced=False)
        history.say(name, "error", epoch=1, pid=1, error_class="ValueError", text="late")
        history.say(name, "service_exit", epoch=1, code=1, signal=None, fenced=False)
        history.seal(name, 1, 1000)
        history.say(name, "slot_copied", epoch=1, step=1000, holder="host-0")
        history.say(name, "slot_skipped", epoch=1, step=1000)
        history.say(name, "service", epoch=1, address="10.0.0.1:1")
        history.say(name, "service", epoch=1, error="no")
        history.say(name, "started", epoch=1, error="no")
        history.say(name, "finished", epoch=1, step=1000)
        history.say(name, "heartbeat", epoch=1, **place)
        history.say(name, "fenced", epoch=1, copies=[])
        history.say(name, "worker_exit", epoch=3, code=1, signal=None, fenced=False)  # nor one that never was
    assert (history.states(), len(history.told), history.machine.epoch.commits.decided) == before
    assert history.machine.reached.step < 99


def test_a_host_that_is_no_member_cannot_speak_for_the_epoch():
    history = running(spares=1)
    history.say("spare-0", "error", epoch=1, pid=1, error_class="ValueError", text="not mine")
    history.say("spare-0", "worker_exit", epoch=1, code=1, signal=None, fenced=False)
    assert history.state is State.RUNNING


@pytest.mark.parametrize("deaf", ["serve", "work", "warm"])
def test_a_worker_that_is_killed_during_recovery_starts_one_more_epoch(deaf):
    """While the service starts, while workers do, and in the first step."""
    history = running()
    history.hosts["host-0"].deaf = {deaf}
    history.kill_worker("host-2")
    history.run(WINDOW_SECONDS + 0.1) if deaf != "warm" else None
    assert history.machine.number == 2
    assert history.state is (State.WARMING if deaf == "warm" else State.FORMING)
    history.hosts["host-0"].deaf = set()
    history.hosts["host-1"].worker = None
    history.say("host-1", "worker_exit", epoch=2, code=None, signal=9, fenced=False)
    history.until_running(3)
    assert [fault["host"] for fault in history.faults()] == ["host-2", "host-1"]


def test_a_dead_coordination_service_blames_nobody():
    history = running()
    for fake in history.hosts.values():
        fake.deaf = {"fence"}
    history.say("host-0", "service_exit", epoch=1, code=None, signal=9, fenced=False)
    for name in FOUR:
        history.kill_worker(name, signal=6)
    for name in FOUR:
        history.hosts[name].deaf = set()
        history.say(name, "fenced", epoch=1, copies=[])
    history.until_running(2)
    (fault,) = history.faults()
    assert (fault["class"], fault["host"]) == ("recoverable", "")
    assert not history.judge.to_json()["history"]["hosts"]


def test_an_agent_that_refuses_is_asked_again():
    history = before_service(judge=table_judge())
    history.hosts["host-0"].deaf = set()
    history.say("host-0", "service", epoch=1, error="the zygote has 2 threads")
    history.until_running(2)
    (fault,) = history.faults()
    assert "2 threads" in fault["cause"]


def test_a_damaged_copy_is_not_chosen_again():
    history = running()
    history.kill_worker("host-2")
    history.until_running(2)
    where = {"holder": "host-1", "file": "own/gen-0", "path": "w", "box": [[0, 4]]}
    history.say("host-0", "rejected", epoch=2, reason="digest", **where)
    (damaged,) = history.machine.damaged
    assert (damaged.holder, damaged.file, damaged.path, damaged.box) == ("host-1", "own/gen-0", "w", ((0, 4),))
    assert damaged.step == history.machine.epoch.start_step
    assert next(note for note in history.notes if note.kind == "rejected").fields["reason"] == "digest"


# A host is lost


def test_a_lost_host_is_known_by_its_lease_and_the_world_shrinks():
    history = running()
    history.lose("host-1")
    assert history.state is State.RUNNING  # agents connect again: a broken stream is no loss
    history.until_running(2)
    assert history.members == ("host-2", "host-3")
    (fault,) = history.faults()
    assert fault["host"] == "host-1"
    (resized,) = [note.fields for note in history.notes if note.kind == "resized"]
    assert (resized["slices_before"], resized["slices_after"]) == (2, 1)


def test_a_short_break_of_the_stream_disturbs_nobody():
    history = running()
    history.lose("host-1")
    history.now += 1.0
    history.connect("host-1")
    assert history.run(3).state is State.RUNNING
    assert history.machine.number == 1


def test_a_worker_whose_agent_is_away_for_a_moment_does_not_hang():
    """The agent was killed, its next one is on its way, and the worker trains on: nobody can see that it does."""
    history = running().run(5)
    assert history.machine.pace.limit(Kind("step", world=4)) < 1.5
    history.lose("host-3")
    history.run(LEASE_SECONDS * 0.9)
    assert history.state is State.RUNNING
    for fake in history.hosts.values():
        fake.worker.hangs = False  # they never did: what the others wait for is a collective with host-3
    history.connect("host-3")
    history.run(2)
    assert history.state is State.RUNNING
    assert not history.faults()


def test_one_that_hangs_while_its_agent_speaks_is_found():
    history = running().run(5)
    history.hosts["host-3"].worker.hang(history.now)
    history.run(LEASE_SECONDS * 0.9)
    assert "hangs in step" in history.faults()[0]["cause"]


def test_a_silent_agent_is_lost_though_its_stream_is_open():
    history = running()
    history.lose("host-1", stream_ends=False)
    history.until_running(2)
    assert "host-1" not in history.members


def test_an_agent_that_never_acknowledges_the_fence_is_as_good_as_gone():
    history = running()
    history.hosts["host-3"].deaf = {"fence"}
    history.kill_worker("host-2")
    history.run(DEADLINES[State.FENCING] - 0.5)
    assert history.state is State.FENCING
    history.run(5, State.RUNNING)
    assert history.machine.number == 2
    assert "host-3" not in history.members
    assert "host-3" in history.faults()[0]["host"]


def test_a_spare_takes_the_place_of_a_lost_host():
    history = running(spares=1)
    assert "spare-0" not in history.members
    history.lose("host-1")
    history.until_running(2)
    assert history.members == ("host-0", "spare-0", "host-2", "host-3")
    ranks = {h: m["rank"] for h, m in history.orders("work", epoch=2)}
    assert ranks == {"host-0": 0, "spare-0": 1, "host-2": 2, "host-3": 3}


def test_a_second_strike_costs_a_host_its_place():
    history = running(spares=1)
    history.kill_worker("host-1")
    history.until_running(2).run(0.3)
    assert history.members == FOUR
    history.kill_worker("host-1")
    history.until_running(3)
    assert history.members == ("host-0", "spare-0", "host-2", "host-3")


def test_two_hosts_at_once_are_one_fault_of_a_slice():
    history = running()
    history.lose("host-2")
    history.lose("host-3")
    history.until_running(2)
    assert history.members == ("host-0", "host-1")
    (fault,) = history.faults()
    assert set(fault["host"].split(", ")) == {"host-2", "host-3"}


def test_with_wait_nothing_goes_on_until_the_host_is_back():
    history = running(judge=table_judge(on_loss="wait"))
    history.lose("host-1")
    history.run(24)
    assert (history.state, history.machine.number) == (State.WAITING, 1)
    history.connect("host-1", new_agent=True)
    history.until_running(2)
    assert history.members == FOUR


def test_a_host_that_is_back_makes_the_world_grow_at_a_step_boundary():
    history = running()
    history.lose("host-1")
    history.until_running(2)
    history.connect("host-1", new_agent=True)
    assert history.run(GROW_SECONDS - 0.5).state is State.RUNNING  # not at once: each resize costs seconds
    history.run(3, State.DRAINING)
    assert {h for h, _ in history.orders("handover")} == {"host-2", "host-3"}
    history.until_running(3)
    assert history.members == FOUR
    assert history.machine.epoch.start_step == history.machine.epoch.commits.committed  # no step was lost
    assert len(history.faults()) == 1  # the handover is no fault


def test_a_host_that_comes_and_goes_does_not_make_the_world_grow():
    history = running()
    history.lose("host-1")
    history.until_running(2)
    for _ in range(3):
        history.connect("host-1", new_agent=True)
        history.run(GROW_SECONDS / 2)
        history.lose("host-1")
        history.run(LEASE_SECONDS + 0.5)
    assert (history.state, history.machine.number) == (State.RUNNING, 2)


@pytest.mark.parametrize(("slices", "each", "how"), [(1, 1, "shrink"), (1, 2, "wait"), (2, 2, "wait")])
def test_a_silent_host_is_taken_back_when_no_world_is_left(slices, each, how):
    """By the same agent: it was never restarted, it only could not be heard."""
    history = History(slices=slices, per_slice=each, judge=table_judge(slices, each, how)).until_running(1).run(2)
    history.lose("host-0")
    assert history.run(6).state is State.WAITING
    history.connect("host-0")
    history.until_running(2)


# A worker hangs


def test_of_a_hung_worker_alone_stacks_are_asked():
    history = running().run(3)
    for name in FOUR:
        history.hosts[name].worker.hang(history.now)
    history.hosts["host-2"].worker.step -= 1  # the others wait in a step that it never entered
    history.run(4).until_running(2)
    asked = {h: m["stacks"] for h, m in history.orders("fence", epoch=1) if "stacks" in m}
    assert asked == {"host-0": False, "host-1": False, "host-2": True, "host-3": False}
    (stacks,) = [note.fields for note in history.notes if note.kind == "stacks"]
    assert stacks == {"host": "host-2", "text": "File loop.py, line 1"}
    (fault,) = history.faults()
    assert fault["host"] == "host-2"
    assert "hangs" in fault["cause"]


def test_of_all_workers_that_hang_at_once_stacks_are_asked():
    history = running().run(3)
    for name in FOUR:
        history.hosts[name].worker.hang(history.now)
    for name in ("host-1", "host-2"):
        history.hosts[name].worker.step -= 1
    history.run(4).until_running(2)
    asked = {h for h, m in history.orders("fence", epoch=1) if m.get("stacks")}
    assert asked == {"host-1", "host-2"}
    assert {note.fields["host"] for note in history.notes if note.kind == "stacks"} == asked
    (fault,) = history.faults()
    assert {e["host"] for e in fault["evidence"] if e["kind"] == "worker_hung"} == asked


def test_what_takes_long_in_its_own_right_is_no_hang():
    """Compiling and saving have limits of their own, and the others wait for whoever does so."""
    history = running().run(3)
    epoch = history.machine.number
    for section in ("save", "evaluate", "compile"):
        for _ in range(10):
            history.now += 0.2
            for name in FOUR:
                place = {"step": 40, "section": section, "seconds": 2.0, "finished": False, "took": []}
                history.say(name, "heartbeat", epoch=epoch, **place)
            history.machine.tick(history.now)
    assert history.state is State.RUNNING


def test_a_coordinator_that_slept_blames_nobody():
    history = running()
    history.now += LEASE_SECONDS + 1  # stopped, or short of a processor; the heartbeats wait in its sockets
    history.machine.tick(history.now)
    assert history.state is State.RUNNING


# States take too long


LATE = {
    State.FORMING: {"work"},
    State.RESTORING: {"begin", "tell"},
    State.WARMING: {"tell"},
    State.FENCING: {"fence"},
    State.DRAINING: {"drain"},
}
"""What host-1 does not do, so that a state does not end by itself, and nobody tells why."""
AT_ONCE = {State.DECIDING}
"""It is left in the moment in which it is entered, as `History` checks."""
WINDOWED = {State.SUSPECT}
UNBOUNDED = {State.WAITING, State.RUNNING, State.DONE, State.ESCALATED}


def stuck_in(state):
    """A run of four hosts in a state in which host-1 does not do its part, and obeys no fence either."""
    history = before_service(judge=table_judge()) if state in START else running()
    for name in FOUR if state is State.DRAINING else ["host-1"]:  # workers drain together or not at all
        history.hosts[name].deaf = {"fence", *LATE[state]}
    if state in START:
        history.hosts["host-0"].deaf = set()
        listening(history)
    elif state is State.FENCING:
        history.kill_worker("host-2")
        history.run(WINDOW_SECONDS + 0.5, State.FENCING)
    else:
        history.drain()
    assert history.state is state
    return history


def test_every_state_has_a_deadline_or_needs_none():
    assert set(DEADLINES) == set(LATE), "what happens after each is tested below"
    assert set(State) == {*DEADLINES, *AT_ONCE, *WINDOWED, *UNBOUNDED}


@pytest.mark.parametrize("state", sorted(DEADLINES))
def test_a_state_that_takes_too_long_ends_its_epoch(state, monkeypatch):
    """A fault like any other: it has a class, it is charged, and the run goes on, or ends as it was asked to."""
    monkeypatch.setattr(histories, "TICK", 0.25)  # half an hour has to pass
    history = stuck_in(state)
    expires = history.machine.entered + DEADLINES[state]
    history.run(expires - history.now - 0.5)
    assert (history.state, history.faults()) == (state, []), "not before the deadline"
    history.run(1.0)
    assert history.state is not state, "and not long after it"
    for name in FOUR:
        if state is not State.FENCING and history.hosts[name].deaf:
            history.hosts[name].deaf, history.hosts[name].worker = set(), None
            history.say(name, "fenced", epoch=1, copies=[])
    history.run(5) if state is State.DRAINING else history.until_running(2)
    (fault,) = history.faults()
    remembered = history.judge.to_json()["history"]
    strikes = {kind: {name: one["strikes"] for name, one in remembered[kind].items()} for kind in ("causes", "hosts")}
    if state is State.FENCING:
        assert "host-1 is lost" in fault["cause"], "an agent that does not end its worker is as good as gone"
        assert fault["class"] == "recoverable"
        assert strikes == {"causes": {"signal": 1, "host": 1}, "hosts": {"host-2": 1, "host-1": 1}}
        assert history.members == ("host-2", "host-3")
        return
    late = FOUR if state is State.DRAINING else ("host-1",)
    assert fault["cause"].startswith(f"{state} took longer than {DEADLINES[state]:.0f}.")
    assert fault["cause"].endswith(f"missing: {', '.join(late)}")
    assert fault["class"] == "transient"
    charged = {} if late == FOUR else {"host-1": 1}  # where all are late none is to blame
    assert strikes == {"causes": {f"phase {state}": 1}, "hosts": charged}
    if state is State.DRAINING:
        assert history.finish.code == STOPPED
    else:
        assert history.members == FOUR, "the first strike costs no host its place"


def test_evidence_is_waited_for_no_longer_than_its_window():
    history = running()
    history.hosts["host-1"].deaf = {"fence"}
    history.kill_worker("host-2")
    assert history.state is State.SUSPECT
    history.run(WINDOW_SECONDS + 2 * histories.TICK, State.FENCING)


def test_a_service_that_never_listens_ends_its_epoch():
    history = before_service(judge=table_judge())
    history.run(DEADLINES[State.FORMING] - 1)
    assert history.state is State.FORMING
    history.hosts["host-0"].deaf = set()
    history.until_running(2)
    (fault,) = history.faults()
    assert "FORMING took longer" in fault["cause"]


def test_an_epoch_that_does_not_drain_is_fenced():
    history = running()
    for name in FOUR:
        history.hosts[name].deaf = {"drain"}
    history.drain()
    history.run(DEADLINES[State.DRAINING] + 2)
    assert history.finish.code == STOPPED
    assert "SUSPECT" in history.states()


def test_a_handover_that_takes_too_long_ends_within_the_notice():
    history = running()
    for name in FOUR:
        history.hosts[name].deaf = {"handover"}
    history.preempt("host-1")
    history.run(HANDOVER_SECONDS - 1)
    assert history.state is State.DRAINING
    history.until_running(2)
    (fault,) = history.faults()
    assert "DRAINING took longer" in fault["cause"]
    assert "host-1" not in history.members


# Preemption


def test_one_preempted_host_leaves_and_no_step_is_lost():
    history = running()
    history.preempt("host-1")
    history.preempt("host-1")  # SIGTERM reaches several processes of a host
    assert history.state is State.DRAINING
    assert len(history.orders("handover")) == 4
    reached = history.hosts["host-0"].worker.step
    history.until_running(2)
    assert history.members == ("host-2", "host-3")
    assert history.machine.epoch.start_step >= reached
    assert not history.faults()
    assert not history.orders("drain")


def test_a_preempted_host_is_replaced_by_a_spare():
    history = running(spares=1)
    history.preempt("host-3")
    history.until_running(2)
    assert history.members == ("host-0", "host-1", "host-2", "spare-0")


def test_a_preempted_spare_disturbs_nobody():
    history = running(spares=1)
    history.preempt("spare-0")
    assert history.run(3).state is State.RUNNING
    history.lose("host-1")
    history.until_running(2)
    assert "spare-0" not in history.members


def test_when_all_hosts_are_told_to_end_everything_is_saved_for_good():
    history = running()
    for name in FOUR:
        history.hosts[name].deaf = {"handover"}  # all four words come before any worker looks
    for name in FOUR:
        history.preempt(name)
    assert {h for h, _ in history.orders("drain")} == set(FOUR)
    history.run(5)
    assert history.finish.code == STOPPED
    assert f"saved at step {history.trained}" in history.finish.text


@pytest.mark.parametrize("state", [State.SUSPECT, State.FENCING])
def test_when_all_hosts_are_told_to_end_amid_a_fault_the_run_ends_and_says_what_is_lost(state):
    history = running()
    history.hosts["host-0"].deaf = {"fence"}
    history.kill_worker("host-2")
    history.run(2, state)
    for name in FOUR:
        history.preempt(name)
    assert history.finish is None  # first the workers are gone
    history.say("host-0", "fenced", epoch=1, copies=[])
    assert history.finish.code == STOPPED
    assert "all hosts were told to end" in history.finish.text
    assert "lost" in history.finish.text
    assert "saved" not in history.finish.text


def test_when_all_hosts_are_told_to_end_while_others_are_waited_for_the_run_ends():
    history = running(judge=table_judge(on_loss="wait"))
    history.lose("host-1")
    history.run(10, State.WAITING)
    for name in ("host-0", "host-2"):
        history.preempt(name)
    assert history.run(3).state is State.WAITING  # host-3 stays
    history.preempt("host-3")
    assert history.finish.code == STOPPED


def test_a_host_whose_stream_breaks_for_a_moment_still_counts_when_the_others_are_told_to_end():
    history = running()
    history.hosts["host-0"].deaf = {"fence"}
    history.kill_worker("host-2")
    for name in FOUR[:3]:
        history.preempt(name)
    history.lose("host-3")
    history.say("host-0", "fenced", epoch=1, copies=[])
    history.run(LEASE_SECONDS / 2)
    assert history.finish is None
    history.connect("host-3")
    history.until_running(2)
    assert history.members == ("host-3",)


def test_when_the_last_hosts_are_told_to_end_during_a_handover_the_workers_save_for_good_instead():
    history = running()
    for name in FOUR:
        history.hosts[name].deaf = {"handover"}  # no worker has looked yet
    history.preempt("host-1")
    history.run(0.5)
    for name in FOUR:
        history.preempt(name)
    history.run(5)
    assert history.finish.code == STOPPED
    assert f"saved at step {history.trained}" in history.finish.text


@pytest.mark.parametrize("last", ["preemption", "drain"])
def test_what_was_handed_over_in_memory_is_not_called_saved_when_the_run_ends_with_it(last):
    history = running()
    history.hosts["host-0"].deaf = {"fence"}  # the workers have ended, and it is not yet known what memory is left
    history.preempt("host-1")
    history.run(1)
    assert all(fake.worker is None for fake in history.hosts.values())
    assert history.state is State.DRAINING
    if last == "drain":
        history.drain()
    else:
        for name in FOUR:
            history.preempt(name)
    history.run(1)
    assert history.finish.code == STOPPED
    assert "saved" not in history.finish.text
    assert "since the newest durable checkpoint, or else since step 0, is lost" in history.finish.text


def test_hosts_that_are_told_to_end_while_the_next_epoch_is_formed_save_for_good():
    history = running()
    history.hosts["host-2"].deaf = {"serve"}  # it serves the epoch without host-0 and host-1
    history.preempt("host-1")
    history.run(3)
    assert (history.state, history.machine.number) == (State.FORMING, 2)
    for name in FOUR:
        history.preempt(name)
    history.say("host-2", "service", epoch=2, address="127.0.0.1:1")
    history.run(5)
    assert history.finish.code == STOPPED
    assert "saved at step" in history.finish.text


def test_a_host_that_is_lost_while_it_hands_over():
    history = running()
    for name in FOUR:
        history.hosts[name].deaf = {"handover"}
    history.preempt("host-1")
    history.lose("host-1")
    history.until_running(2)
    assert history.members == ("host-2", "host-3")


def test_a_preempted_host_that_vanishes_before_it_answers_the_fence():
    history = running()
    history.hosts["host-1"].deaf = {"fence"}
    history.preempt("host-1")
    history.run(3)
    history.lose("host-1")
    history.run(LEASE_SECONDS + COPIES_SECONDS + 10, State.RUNNING)
    assert history.machine.number == 2


def test_workers_that_ended_are_not_taken_for_hung_while_their_last_checkpoint_is_copied():
    history = running().run(3)
    for name in FOUR:
        history.hosts[name].deaf = {"handover"}
    history.preempt("host-1")
    history.run(0.5)
    step = history.hosts["host-0"].worker.step + 1
    for name in FOUR:
        history.hosts[name].worker = None
        history.seal(name, 1, step)
        history.say(name, "finished", epoch=1, pid=1, step=step)
        history.say(name, "worker_exit", epoch=1, said="finished", code=STOPPED, signal=None, fenced=False)
    history.run(COPIES_SECONDS - 0.5)
    assert history.state is State.DRAINING
    history.run(2)
    assert history.machine.number == 2
    assert not history.faults()


# Draining


def test_a_drain_saves_and_stops():
    history = running()
    history.drain("SIGINT")
    history.drain("SIGTERM")
    assert len(history.orders("drain")) == 4
    history.run(5)
    assert history.finish.code == STOPPED
    assert "SIGINT" in history.finish.text
    assert history.states()[-2:] == ["DRAINING", "DONE"]


def test_a_drain_without_a_world_ends_at_once():
    history = History(come=False)
    history.drain()
    assert history.finish.code == STOPPED


@pytest.mark.parametrize("state", [State.SUSPECT, State.FENCING])
def test_a_drain_amid_a_fault_ends_the_run_after_it(state):
    history = running()
    history.hosts["host-0"].deaf = {"fence"}
    history.kill_worker("host-2")
    history.run(2, state)
    history.drain()
    assert history.finish is None  # first the workers are gone
    history.say("host-0", "fenced", epoch=1, copies=[])
    assert history.finish.code == STOPPED
    assert not history.orders("serve", epoch=2)


def test_a_drain_while_hosts_are_waited_for_after_a_fault():
    history = running(judge=table_judge(on_loss="wait"))
    history.lose("host-1")
    history.run(10, State.WAITING)
    history.drain()
    assert history.finish.code == STOPPED


@pytest.mark.parametrize("how", ["drain", "preemption"])
def test_a_drain_while_workers_are_restored(how):
    history = before_service()
    for name in FOUR:
        history.hosts[name].deaf = {"begun"}
    listening(history)
    history.drain() if how == "drain" else history.preempt("host-1")
    assert history.state is State.DRAINING
    history.run(5)
    assert (history.finish is not None) == (how == "drain")


@pytest.mark.parametrize("how", ["drain", "handover"])
def test_a_drain_while_the_service_starts_reaches_the_workers_or_ends_without_them(how):
    history = before_service(judge=table_judge())
    history.drain() if how == "drain" else history.preempt("host-1")
    listening(history)
    history.run(30)
    if how == "drain":
        assert history.finish is not None
    else:
        assert "host-1" not in history.members


def test_a_drain_right_after_a_takeover_saves_first():
    history, found = taken_over(missing=("host-3",))
    found.drain()
    assert found.finish is None
    assert history is not None


# Errors that do not go away


def test_the_same_error_twice_ends_the_run_with_the_traceback_last():
    history = running()
    history.raise_in_worker("host-1", "ValueError", "bad data", step=20)
    history.until_running(2)
    assert history.finish is None
    history.raise_in_worker("host-1", "ValueError", "bad data", step=20)
    history.run(2)
    assert history.finish.code == 1
    assert history.finish.text.splitlines()[-2:] == ["Traceback:", "ValueError: bad data"]
    assert history.states()[-2:] == ["DECIDING", "ESCALATED"]
    assert {m["code"] for _, m in history.orders("end")} == {1}
    assert len(history.epochs) == 2


def test_what_a_worker_says_before_it_ends_by_it_is_told_once():
    history = running()
    for epoch in (1, 2):
        for name in FOUR:
            history.hosts[name].deaf = {"fence"}
        history.raise_in_worker("host-1", "ValueError", "bad data", step=20)
        for name in FOUR:
            history.hosts[name].deaf, history.hosts[name].worker = set(), None
            history.say(name, "fenced", epoch=epoch, copies=[])
        history.until_running(2) if epoch == 1 else history.run(1)
    what = "worker of host-1 raised ValueError in step after 20 updates: bad data"
    assert [fault["cause"] for fault in history.faults()] == [what] * 2
    assert [len(fault["evidence"]) for fault in history.faults()] == [2, 2], "both are kept"
    reason, *rest = history.finish.text.splitlines()
    assert reason.startswith(f"same error twice: {what}")
    assert rest == [f"  {what}", "Traceback:", "ValueError: bad data"]


def test_a_verdict_may_ask_for_a_pause():
    history = running(judge=ScriptedJudge(4))
    history.judge.verdicts.append(Verdict("transient", "x", "", (), delay=3.0))
    history.kill_worker("host-1")
    assert history.run(2.5).state is State.WAITING
    assert history.machine.number == 1
    history.until_running(2)


def test_a_recipe_that_cannot_be_imported_ends_the_run_with_its_traceback():
    history = History(come=False)
    for fake in history.hosts.values():
        fake.ready = False
    for name in FOUR:
        history.connect(name)
    history.say("host-2", "zygote_failed", text="Traceback:\nImportError: no module named nothing")
    assert history.finish.code == 1
    assert "host-2" in history.finish.text
    assert history.finish.text.splitlines()[-1] == "ImportError: no module named nothing"


def test_a_zygote_that_cannot_be_started_again_does_not_end_a_run_that_trains():
    history = running()
    history.say("host-2", "zygote_failed", text="no memory")
    assert history.run(1).state is State.RUNNING


# Another coordinator


def taken_over(missing=()):
    """A run whose coordinator was started again; these members have not connected to the new one."""
    history = running().run(3)
    found = History(judge=table_judge(), come=False, epoch=history.machine.number)
    found.trained = history.trained
    for name, fake in history.hosts.items():
        found.hosts[name] = dataclasses.replace(fake, there=False)
    for name in FOUR:
        if name not in missing:
            found.connect(name)
    return history, found


def test_a_coordinator_that_is_started_again_disturbs_nobody():
    before, found = taken_over()
    assert found.states() == ["RUNNING"]
    assert found.members == FOUR
    assert found.machine.number == 1
    assert found.machine.lineage == before.machine.lineage
    assert not found.told  # not a word to anyone
    found.run(5)
    assert (found.state, found.machine.number) == (State.RUNNING, 1)
    assert found.machine.epoch.commits.committed == found.trained  # the next checkpoints count
    assert found.judge.to_json()["members"]


def test_an_adopted_world_recovers_as_any_other():
    _, found = taken_over()
    found.run(1)
    found.kill_worker("host-2")
    found.until_running(2)
    assert found.members == FOUR
    assert [epoch for epoch, _ in found.machine.lineage] == [1, 2]


def test_a_coordinator_waits_for_all_members_of_the_epoch_that_it_finds():
    _, found = taken_over(missing=("host-3",))
    assert found.run(Settings.adopt_seconds - 1).state is State.WAITING
    found.connect("host-3")
    assert (found.state, found.machine.number) == (State.RUNNING, 1)


def test_a_member_that_does_not_come_to_the_new_coordinator_is_lost():
    _, found = taken_over(missing=("host-3",))
    found.run(Settings.adopt_seconds - 1)
    assert found.state is State.WAITING
    found.run(4)
    assert (found.state, found.members) == (State.RUNNING, ("host-0", "host-1"))


def test_a_worker_that_hangs_at_once_after_a_coordinator_came_back_is_found_as_soon_as_ever():
    _, found = taken_over()
    assert found.state is State.RUNNING
    for name in FOUR:
        found.hosts[name].worker.hang(found.now)
    found.run(4).until_running(2)
    assert "hangs" in found.faults()[0]["cause"]


def unseen(history, name, exit_is_told):
    """A worker dies while the new coordinator still waits for the last member."""
    for other in FOUR:
        history.hosts[other].worker.hang(history.now)
    if exit_is_told:
        history.kill_worker(name, 11)
    else:
        history.hosts[name].worker = None


def test_a_worker_that_dies_before_its_epoch_is_found_is_no_secret():
    _, found = taken_over(missing=("host-3",))
    unseen(found, "host-1", exit_is_told=True)
    assert found.state is State.WAITING
    found.connect("host-3")
    found.until_running(2)
    (fault,) = found.faults()
    assert (fault["host"], fault["class"]) == ("host-1", "recoverable")
    assert "SIGSEGV" in fault["cause"]
    assert found.members == FOUR


def test_nor_one_that_died_before_its_agent_came_to_the_new_coordinator():
    _, found = taken_over(missing=("host-3",))
    unseen(found, "host-3", exit_is_told=False)
    found.connect("host-3")
    assert found.state is State.WAITING
    found.run(Settings.adopt_seconds + 1)
    found.until_running(2)
    assert [fault["host"] for fault in found.faults()] == ["host-3"]
    assert found.members == FOUR


def test_nor_all_of_them():
    _, found = taken_over(missing=("host-3",))
    for name in FOUR[:3]:
        found.kill_worker(name)
    found.hosts["host-3"].worker = None
    found.connect("host-3")
    found.run(Settings.adopt_seconds + 1)
    found.until_running(2)
    assert found.members == FOUR


def test_what_was_said_early_of_an_older_epoch_changes_nothing():
    _, found = taken_over(missing=("host-3",))
    found.say("host-1", "worker_exit", epoch=0, code=None, signal=9, fenced=False, section="step", step=3)
    found.connect("host-3")
    found.run(1)
    assert (found.state, found.machine.number) == (State.RUNNING, 1)
    assert not found.faults()


def test_a_world_that_ends_well_before_it_is_found_ends_well():
    _, found = taken_over(missing=("host-3",))
    ended = {"said": "finished", "code": 0, "signal": None, "fenced": False}
    for name in FOUR[:3]:
        found.say(name, "worker_exit", epoch=1, **ended)
    found.connect("host-3")
    found.say("host-3", "worker_exit", epoch=1, **ended)
    assert found.finish.code == 0


def test_what_policy_remembers_outlives_the_coordinator():
    history = running()
    history.raise_in_worker("host-1", "ValueError", "bad data", step=20)
    history.until_running(2)
    found = History(judge=table_judge(), come=False, epoch=2)
    for name, fake in history.hosts.items():
        found.hosts[name] = fake
    for name in FOUR:
        found.connect(name)
    found.raise_in_worker("host-1", "ValueError", "bad data", step=20)
    found.run(2)
    assert found.finish.code == 1


def test_a_new_coordinator_never_takes_a_commit_back():
    """Workers would write over the newest complete checkpoint."""
    _, found = taken_over()
    step = found.trained + 10
    for name in FOUR:
        found.say(name, "slot_skipped", epoch=1, step=step)
    assert all(m["committed"] >= found.trained for _, m in found.orders("verdict"))


# What a broken stream may swallow: an agent says nothing twice


def test_a_restarted_agent_of_a_member_ends_the_epoch():
    history = running()
    history.lose("host-1")
    history.connect("host-1", new_agent=True)
    assert "FENCING" in history.states()
    history.until_running(2)
    assert [fault["host"] for fault in history.faults()] == ["host-1"]  # and not those that waited for it


@pytest.mark.parametrize("until", [None, State.SUSPECT, State.FENCING])
def test_a_host_that_is_back_within_its_lease_without_its_memory_was_lost(until):
    """Its peers saw a collective fail, its new agent has nothing to fence, and no lease ends: who was it?"""
    history = running(spares=1)
    for fake in history.hosts.values():
        fake.deaf = {"fence"}
    history.lose("host-3")
    if until is not None:
        words = {"is_collective": True, "text": "Gloo", "error_class": "JaxRuntimeError"}
        history.say("host-1", "error", epoch=1, pid=1, **words)
        history.run(WINDOW_SECONDS * 2, until)
    history.hosts["host-3"].ready = False  # its zygote imports
    history.connect("host-3", new_agent=True)
    for name in FOUR[:3]:
        history.hosts[name].worker = None
        history.say(name, "fenced", epoch=1, copies=[])
    history.run(WINDOW_SECONDS * 2)
    assert history.states()[-4:] == ["FORMING", "RESTORING", "WARMING", "RUNNING"]
    (fault,) = history.faults()
    assert (fault["class"], fault["host"]) == ("recoverable", "host-3")
    assert "started anew" in fault["cause"]
    assert set(history.members) == {"host-0", "host-1", "host-2", "spare-0"}, "the spare is there, so nobody waits"
    history.hosts["host-3"].ready = True
    history.say("host-3", "ready", pid=1)
    history.run(2)
    history.lose("host-0")
    history.until_running(3)
    assert "host-3" in history.members, "it is a spare now"


def test_a_new_agent_that_found_memory_lost_only_its_worker():
    history = running(spares=1)
    history.hosts["host-3"].copies = [{"file": "own/gen-0"}]
    history.connect("host-3", new_agent=True)
    history.until_running(2)
    (fault,) = history.faults()
    assert "SIGKILL" in fault["cause"]
    assert history.members == FOUR


def test_memory_that_an_agent_tells_of_when_it_connects_again_counts():
    history = running()
    history.hosts["host-1"].deaf = {"fence"}
    history.kill_worker("host-2")
    history.lose("host-1")
    fake = history.hosts["host-1"]
    fake.worker, fake.fenced, fake.copies, fake.deaf = None, 1, [{"file": "own/gen-0"}], set()
    seen = []
    history.machine._source = lambda hosts, *_: (seen.append(list(hosts["host-1"].copies)), (0, None))[1]
    history.connect("host-1")
    assert seen == [[{"file": "own/gen-0"}]]


def test_a_host_whose_partition_heals_is_welcome_again():
    history = running()
    history.lose("host-1")
    history.until_running(2)
    history.connect("host-1")  # the same agent
    history.run(10)
    assert history.members == FOUR


def test_an_old_worker_on_a_host_whose_partition_heals_is_ended():
    history = running()
    history.lose("host-1")
    history.until_running(2)
    history.connect("host-1")
    history.run(1)
    assert history.hosts["host-1"].worker is None


def test_an_end_that_was_never_told_does_not_leave_the_run_waiting_for_ever():
    history = running(steps=60)
    history.run(2.5)
    history.lose("host-1")
    fake = history.hosts["host-1"]
    for name in FOUR:
        history.hosts[name].worker = None
        history.say(name, "finished", epoch=1, pid=1, step=60)
        history.say(name, "worker_exit", epoch=1, said="finished", code=0, signal=None, fenced=False)
    fake.worker = None
    history.connect("host-1")
    history.trained = 60
    history.run(20)
    assert history.finish is not None or history.machine.number == 2


def test_steps_whose_reports_were_lost_do_not_block_the_memory_tier():
    history = running()
    commits = history.machine.epoch.commits
    before, step = commits.decided, commits.decided + 10
    for name in ("host-0", "host-2", "host-3"):
        history.seal(name, 1, step)
    history.lose("host-1")
    history.connect("host-1")
    for later in (step + 10, step + 20):
        for name in FOUR:
            history.say(name, "slot_skipped", epoch=1, step=later)
    assert commits.decided > before


def test_an_agent_that_was_slow_to_fence_may_take_part_again():
    history = running()
    history.hosts["host-3"].deaf = {"fence"}
    history.kill_worker("host-2")
    history.run(7, State.RUNNING)
    assert "host-3" not in history.members
    history.hosts["host-3"].worker, history.hosts["host-3"].fenced = None, 1
    history.hosts["host-3"].deaf = set()
    history.say("host-3", "fenced", epoch=1, copies=[])
    history.run(10)
    assert "host-3" in history.members


# Nobody asked for it


@pytest.mark.parametrize("state", [State.FORMING, State.RESTORING, State.WARMING, State.RUNNING])
@pytest.mark.parametrize("code", [0, STOPPED])
def test_a_world_that_ends_by_itself_in_any_state(state, code):
    """All workers of a world stop together when one gets a signal; some messages may have been lost before."""
    history = before_service()
    if state is State.RUNNING:
        history.hosts["host-0"].deaf = set()
        listening(history)
        history.until_running()
    elif state is not State.FORMING:
        for name in FOUR:
            history.hosts[name].deaf = {"work"}
        listening(history)
        for name in FOUR:
            history.say(name, "started", epoch=1, pid=1)
            if state is State.WARMING:
                history.say(name, "begun", epoch=1)
    assert history.state is state
    for fake in history.hosts.values():
        fake.worker = None
    for name in FOUR:
        history.say(name, "worker_exit", epoch=1, said="finished", code=code, signal=None, fenced=False)
    for fake in history.hosts.values():
        fake.deaf = set()
    if code == 0:
        assert history.finish.code == 0
    else:
        history.run(COPIES_SECONDS + 5)
        assert history.machine.number == 2


# Whatever happens

HOSTS = st.sampled_from([*FOUR, "spare-0"])
EPOCHS = st.sampled_from(["this", "this", "this", "old", "new", "none"])
KINDS = (
    *("service", "started", "begun", "restored", "finished", "slot_sealed", "slot_skipped", "slot_copied"),
    *("slot_uncopied", "worker_exit", "service_exit", "error", "heartbeat", "ready", "preempted", "fenced", "rejected"),
    *("stacks", "alarm", "message"),
)
EVENTS = st.one_of(
    st.tuples(st.just("say"), HOSTS, st.sampled_from(KINDS), EPOCHS, st.integers(0, 7)),
    st.tuples(st.just("run"), st.sampled_from([0.05, 0.3, 1.0, 2.5, 6.0])),
    st.tuples(st.sampled_from(["lose", "silent", "back", "new", "kill", "deaf", "obeys"]), HOSTS),
    st.tuples(st.sampled_from(["drain"])),
)


def soup(kind, which):
    """A message with all the fields that any kind has, in one of eight variants."""
    signal = (None, None, 9, 11, 9, None, 6, None)[which]
    return {
        "address": "127.0.0.1:1",
        **({"error": "no"} if kind in ("service", "started") and which > 5 else {}),
        "error_class": ("", "ValueError", "", "", "JaxRuntimeError", "NoGoodCopy", "", "ImportError")[which],
        "is_collective": which == 4,
        "text": "Gloo failed" if which == 4 else "text",
        "traceback": "Traceback",
        "code": None if signal else (0, 1, None, None, None, 75, None, None)[which],
        "signal": signal,
        "said": "finished" if which in (0, 5) else "error",
        "fenced": which in (2, 6),
        "step": 10 * which,
        "section": ("step", "data", "save", "compile", "start", "restore", "evaluate", "nonsense")[which]
        if kind != "heartbeat"
        else ("step", "data", "save", "compile", "step", "restore", "evaluate", "step")[which],
        "seconds": (0.0, 0.1, 1.0, 5.0, 100.0, 0.1, 0.1, 0.1)[which],
        "finished": which == 6,
        "took": [["step", 0.1, False]] * which,
        "holder": FOUR[which % 4],
        "copies": [],
        "sources": {},
        "bytes": 1,
        "blocked_seconds": 0.0,
        "pid": 1,
        "reason": "r",
        "what": "w",
        "detail": "d",
        "file": "own/gen-0",
        "path": "w",
        "box": [[0, 1]],
    }


@settings(max_examples=80, deadline=None)
@given(st.lists(EVENTS, max_size=30), st.booleans(), st.booleans())
def test_no_history_leaves_the_diagram_or_starts_an_epoch_beside_another(events, is_scripted, is_running):
    """`histories.py` checks each step of it; here is only what happens, sensible or not."""
    history = History(spares=1, judge=ScriptedJudge(3) if is_scripted else table_judge())
    if is_running:
        history.until_running()
    for event, *details in events:
        if history.finish is not None:
            break
        number = history.machine.number
        match event, details:
            case "say", [name, kind, epoch, which]:
                number += {"this": 0, "old": -1, "new": 1, "none": 0}[epoch]
                fields = soup(kind, which)
                if kind == "fenced":  # an agent says so when it is so
                    worker = history.hosts[name].worker
                    if worker is not None and worker.epoch <= number:
                        continue
                if epoch != "none" or kind == "fenced":
                    fields["epoch"] = number
                history.say(name, kind, **fields)
            case "run", [seconds]:
                history.run(seconds)
            case "drain", []:
                history.drain()
            case "lose" | "silent", [name]:
                history.lose(name, stream_ends=event == "lose")
            case "back" | "new", [name]:
                history.connect(name, new_agent=event == "new")
            case "kill", [name] if history.hosts[name].worker is not None:
                history.kill_worker(name)
            case "deaf", [name]:
                history.hosts[name].deaf = {"fence", "work"}
            case "obeys", [name]:
                history.hosts[name].deaf = set()
    assert history.epochs == sorted(set(history.epochs))
    lineage = [epoch for epoch, _ in history.machine.lineage]
    assert lineage == list(range(1, len(lineage) + 1))


@pytest.mark.parametrize("fields", [{}, {"section": "lunch"}, {"seconds": "long"}, {"took": [["step", "x", 1]]}])
def test_a_heartbeat_that_makes_no_sense_ends_nothing_but_its_sender(fields):
    history = running()
    whole = {"step": 20, "section": "step", "seconds": 0.1, "finished": False, "took": []}
    message = {"kind": "heartbeat", "epoch": history.machine.number, **({**whole, **fields} if fields else {})}
    with pytest.raises((KeyError, ValueError, TypeError)):
        history.machine.message("host-1", message, history.now)
    history.run(1)
    assert history.state is State.RUNNING


def test_a_host_that_was_told_to_end_while_nobody_listened_says_so_when_it_connects():
    history = running()
    history.lose("host-1")
    history.connect("host-1", is_leaving=True)
    history.run(3, State.RUNNING)
    history.until_running(2)
    assert "host-1" not in history.members
    assert not history.faults()


def test_and_to_a_coordinator_that_takes_over():
    _, found = taken_over(missing=("host-1",))
    found.connect("host-1", is_leaving=True)
    found.run(1)
    found.until_running(2)
    assert "host-1" not in found.members
    assert not found.faults()


def test_coordinators_that_die_one_after_the_other_leave_the_epoch_as_it_is():
    """Each of them writes into the run directory, where the highest epoch that is told grows."""
    history, found = taken_over()
    later = History(judge=table_judge(), come=False, epoch=found.machine.number + 5)
    later.machine.take_over(found.machine.to_json(), later.now)
    for name, fake in history.hosts.items():
        later.hosts[name] = fake
    for name in FOUR:
        later.connect(name)
    later.run(1)
    assert (later.state, later.machine.number) == (State.RUNNING, 1)
    assert not later.orders("fence")


def started_again(history):
    """A coordinator that knows from its votes what was decided, and whom no agent has found yet."""
    later = History(judge=table_judge(), come=False, epoch=history.machine.number)
    later.machine.take_over(history.machine.to_json(), later.now)
    for name, fake in history.hosts.items():
        later.hosts[name] = dataclasses.replace(fake, there=False)
    later.trained = history.trained
    return later


def test_a_stop_that_comes_before_the_agents_do_waits_for_them():
    """Who ended the run at once would leave workers that train on for nobody."""
    later = started_again(running().run(3))
    later.drain()
    assert later.run(Settings.adopt_seconds - 1).finish is None
    assert later.machine.to_be_told(later.now) == set(FOUR)
    for name in FOUR:
        later.connect(name)
    assert [host for host, _ in later.orders("drain")] == list(FOUR)
    later.run(10)
    assert later.finish.code == STOPPED
    assert {host for host, _ in later.orders("end")} == set(FOUR)


def test_but_not_for_ever():
    later = started_again(running().run(3))
    later.drain()
    later.run(Settings.adopt_seconds + 1)
    assert later.finish.code == STOPPED
    assert "while no worker was running" in later.finish.text


def test_nor_where_one_of_them_comes_and_no_world_can_be_formed_of_it():
    later = started_again(running().run(3))
    later.drain()
    later.hosts["host-0"].worker = None
    later.connect("host-0")
    later.run(Settings.adopt_seconds + 1)
    assert later.finish.code == STOPPED
    assert [host for host, _ in later.orders("end")] == ["host-0"]


def test_who_is_to_be_told_of_the_end():
    history = running()
    assert history.machine.to_be_told(history.now) == set(FOUR)
    history.lose("host-1")
    assert history.machine.to_be_told(history.now) == set(FOUR), "it may come again"
    history.run(LEASE_SECONDS + 1)
    assert history.machine.to_be_told(history.now) == set(FOUR) - {"host-1"}


# Zygotes


def test_a_zygote_that_dies_again_and_again_ends_a_run_that_has_not_begun_with_the_true_cause():
    history = History(come=False)
    history.hosts["host-2"].ready = False
    for name in FOUR:
        history.connect(name)
    history.say("host-2", "zygote_failed", text="it died 5 times in a row, the last time: SIGKILL", raised=False)
    assert history.finish.code == 1
    assert (
        history.finish.text == "no zygote can be started on host-2:\nit died 5 times in a row, the last time: SIGKILL"
    )


def test_a_zygote_that_fails_in_a_run_that_trains_is_an_alarm_with_its_last_line():
    history = running()
    history.say("host-2", "zygote_failed", text="Traceback:\nImportError: no module named nothing\n", raised=True)
    assert history.run(1).state is State.RUNNING
    (alarm,) = [note.fields for note in history.notes if note.kind == "alarm"]
    assert alarm["what"] == "zygote"
    assert alarm["detail"] == "the recipe cannot be imported on host-2: ImportError: no module named nothing"
