"""Durable steps from memory slots: when one is due, what ends an attempt, and what workers leave alone meanwhile."""

from histories import History, ScriptedJudge
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.checkpoint.interval import allowed
from jaxscale.supervisor.machine import NO_MEMORY
from jaxscale.supervisor.persisting import LIMIT_SECONDS, Persisting

HOSTS = ("host-0", "host-1")
FOUR = (*HOSTS, "host-2", "host-3")


def running(**more):
    """Four hosts, a memory checkpoint each 10 steps (a second), a durable one each 50."""
    return History(**{"durable_every": 50, **more}).until_running(1)


def alarms(history):
    return [note.fields["detail"] for note in history.notes if note.kind == "alarm"]


def events(history):
    """Steps of the durable tier's events."""
    return [n.fields["step"] for n in history.notes if n.kind == "sealed" and n.fields["tier"] == "durable"]


def test_a_step_is_due_when_a_multiple_of_the_cadence_is_passed():
    one = Persisting(HOSTS, 50, 40)
    assert not one.begins(49, 0.0)
    assert one.begins(53, 0.0)
    assert (one.phase, one.keep) == ("room", 53)
    assert not one.begins(110, 1.0), "one at a time"
    assert one.has_room(53, 1.0)
    assert [one.written(name, 53, 2.0) for name in ("host-0", "host-0", "host-1")] == [False, False, True]
    one.sealed(53, 2.0)
    assert (one.phase, one.keep, one.done) == ("idle", -1, 53)
    assert not one.begins(99, 3.0)
    assert one.begins(100, 3.0)


def test_none_is_due_without_a_cadence():
    assert not Persisting(HOSTS, 0, -1).begins(1000, 0.0)


def test_after_a_failure_it_waits_longer_each_time_and_takes_what_is_newest_then():
    one, now, waits = Persisting(HOSTS, 50, 0), 0.0, []
    for failure in range(4):
        assert one.begins(60 + failure, now)
        assert one.failed(60 + failure, now)
        assert not one.failed(60 + failure, now), "said by the next host"
        began = now
        while not one.begins(64 + failure, now):
            now += 0.01
        waits.append(now - began)
        one.step, one.phase = -1, "idle"
    assert waits == sorted(waits)
    assert waits[3] > 4 * waits[0] > 0


def test_a_phase_that_lasts_too_long_is_seen():
    one = Persisting(HOSTS, 50, 0)
    one.begins(50, 10.0)
    assert not one.is_stuck(10.0 + LIMIT_SECONDS)
    assert one.is_stuck(10.1 + LIMIT_SECONDS)
    one.has_room(50, 11.0 + LIMIT_SECONDS)
    assert not one.is_stuck(12.0 + LIMIT_SECONDS)
    assert not Persisting(HOSTS, 50, 0).is_stuck(1e9)


STEPS = st.integers(0, 300)
CALLS = st.one_of(
    st.tuples(st.just("begins"), STEPS),
    st.tuples(st.just("has_room"), STEPS),
    st.tuples(st.just("written"), st.sampled_from(HOSTS), STEPS),
    st.tuples(st.just("failed"), STEPS),
    st.tuples(st.just("sealed"), STEPS),
    st.tuples(st.just("again"), st.sampled_from(HOSTS)),
)


@settings(max_examples=300)
@given(st.lists(CALLS, max_size=60))
def test_whatever_is_said_in_whatever_order(calls):
    """Words of older attempts come late: only what fits the step and the phase under way moves anything."""
    one, now, wrote = Persisting(HOSTS, 50, 0), 0.0, set()
    for name, *given_ in calls:
        now += 0.5
        before = (one.step, one.phase, one.done)
        if name == "again":  # what an agent says of the step under way
            name, given_ = "written", [*given_, one.step]
        if name == "sealed":
            one.sealed(*given_, now)
        elif getattr(one, name)(*given_, now):
            if name == "begins":
                wrote = set()
                assert before[1] == "idle"
                assert one.step // 50 > one.done // 50
            elif name == "written":
                assert before[1] == "copy"
                assert wrote | {given_[0]} == set(HOSTS), "both have written this step"
            else:
                assert before[0] == given_[0]
        elif name != "written":
            assert (one.step, one.phase, one.done) == before
        if name == "written" and before[:2] == (given_[1], "copy"):
            wrote.add(given_[0])
        assert one.done >= before[2]
        assert (one.keep == -1) == (one.phase == "idle")


def test_a_run_makes_durable_steps_beside_training():
    history = running()
    while not history.storage.sealed:
        history.run(0.05)
    assert {fake.keep for fake in history.hosts.values()} == {-1}, "the slots are free again at once"
    history.run(11)
    assert history.storage.sealed == [50, 100, 150] == events(history)
    assert [what.what for what in history.storage.asked] == ["room", "finalise"] * 3
    assert [host for host, _ in history.orders("persist", 1)] == [*FOUR] * 3
    assert not alarms(history)


def test_storage_that_hangs_keeps_one_slot_and_stops_no_training():
    history = running()
    history.storage.hangs = True
    history.run(60)
    assert [what.what for what in history.storage.asked] == ["room"]
    assert {fake.keep for fake in history.hosts.values()} == {50}
    assert history.hosts["host-0"].worker.step > 550
    history.storage.hangs = False
    history.answer(history.storage.asked[0])
    history.run(2)
    first, second = history.storage.sealed[:2]
    assert first == 50
    assert second > 500, "the newest, not each that was missed"


def test_an_attempt_that_takes_too_long_is_given_up():
    history = running()
    history.hosts["host-3"].deaf = {"persist"}
    history.run(6)
    history.hosts["host-3"].deaf = set()
    history.machine.epoch.persisting.entered -= LIMIT_SECONDS
    history.run(3)
    assert alarms(history) == ["step 50: copy takes too long"]
    assert history.storage.sealed


def test_storage_that_fails_is_an_alarm_each_time_and_is_tried_again_with_a_newer_step():
    history = running()
    history.storage.fails = "No space left on device"
    history.run(30)
    assert not history.storage.sealed
    said = alarms(history)
    assert len(said) >= 3
    assert all(line.endswith("No space left on device") for line in said)
    history.storage.fails = ""
    history.run(12)
    assert history.storage.sealed
    assert history.hosts["host-0"].worker.step > 400


def test_a_host_that_cannot_write_its_part_says_why():
    history = running()
    history.hosts["host-2"].deaf = {"persist"}
    history.run(5.5)
    assert history.machine.epoch.persisting.phase == "copy"
    history.say("host-2", "unpersisted", epoch=1, step=50, reason="the persister ended")
    assert alarms(history) == ["step 50: host-2: the persister ended"]
    history.hosts["host-2"].deaf = set()
    history.run(5)
    assert history.storage.sealed[0] in (50, 60, 70)


def test_a_lost_host_ends_the_attempt_and_the_next_world_makes_the_step():
    history = running(slices=2, per_slice=1, judge=ScriptedJudge(2))
    history.hosts["host-1"].deaf = {"persist"}
    history.run(5.5)
    assert not history.storage.sealed
    history.kill_worker("host-1")
    history.hosts["host-1"].deaf = set()
    history.until_running(2).run(8)
    assert history.storage.sealed
    assert {what.epoch for what in history.storage.asked if what.what == "finalise"} == {2}
    history.say("host-1", "persisted", epoch=1, step=50, bytes=9, seconds=0.1)  # late
    assert len(history.storage.sealed) == len(set(history.storage.sealed))


def test_a_seal_that_is_told_after_its_epoch_counts():
    """The step is there, whoever has formed a new world meanwhile."""
    history = running(slices=2, per_slice=1, judge=ScriptedJudge(2))
    history.run(4)
    history.storage.hangs = True
    history.run(1.5)
    history.answer(history.storage.asked.pop(0))
    (finalising,) = [what for what in history.storage.asked if what.what == "finalise"]
    history.kill_worker("host-1")
    history.until_running(2)
    history.answer(finalising)
    assert (history.machine.durable, events(history)) == (50, [50])


def test_once_a_host_has_no_memory_tier_all_workers_save_themselves():
    history = running().run(3)
    assert {fake.plain for fake in history.hosts.values()} == {-1}
    history.say("host-1", "alarm", epoch=1, what=NO_MEMORY, detail="no room")
    reached = history.hosts["host-0"].worker.step
    (plain,) = {fake.plain for fake in history.hosts.values()}
    assert plain > reached, "all of them have read it before it is due"
    history.say("host-2", "alarm", epoch=1, what=NO_MEMORY, detail="no room")
    assert {fake.plain for fake in history.hosts.values()} == {plain}


def test_the_last_state_is_the_workers():
    history = running(steps=50).run(12)
    assert history.finish is not None
    assert history.finish.code == 0
    assert not history.storage.asked


# Where the run chooses: as far apart as is worth it


def by_time(**more):
    """Four hosts, a memory checkpoint each second, durable ones at most a minute apart."""
    return running(durable_every="auto", durable_apart=60.0, **more)


def test_durable_steps_are_seconds_apart_whatever_the_epoch():
    history = by_time()
    began = history.now
    while not history.storage.sealed:
        history.run(0.5)
    assert 55 < history.now - began < 65
    for _ in range(3):  # no epoch lasts as long as the interval
        history.run(25)
        history.kill_worker("host-1")
        history.until_running()
    assert len(history.storage.sealed) == 2
    told = [note.fields for note in history.notes if note.kind == "interval"]
    assert told == [{"tier": "durable", "seconds": 60.0}]


def test_a_coordinator_that_begins_counts_from_the_newest_step_on_disk():
    history = by_time(durable=30, durable_age=50.0)
    began = history.now
    while not history.storage.sealed:
        history.run(0.5)
    assert history.now - began < 15


def test_a_newest_step_that_is_too_old_is_an_alarm_once():
    history = by_time()
    history.storage.fails = "no room"
    history.run(allowed(60.0) - 10)
    assert not [text for text in alarms(history) if "allowed" in text]
    history.run(100)
    late = [text for text in alarms(history) if "allowed" in text]
    assert late == ["no durable step for 82 s; allowed are 82"]
    history.storage.fails = ""
    history.run(30)
    assert history.storage.sealed
    history.storage.fails = "no room again"
    history.run(90)
    assert len([text for text in alarms(history) if "allowed" in text]) == 2
