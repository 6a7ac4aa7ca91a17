"""What a person sees of a supervised run: faults in two lines, how long they took, and nothing that is not so."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from told_lines import KILLED, began, event, exited, fault, metrics, recovery, state, workers, write

from jaxscale.checkpoint.layout import COMMIT_FILE, MANIFEST, step_folder
from jaxscale.recipe import load_recipe
from jaxscale.supervisor.follow import EVENTS, METRICS, Follower, offsets_of, tail_offset
from jaxscale.supervisor.launch import ClusterShape
from jaxscale.supervisor.show import Show, screen, survived
from jaxscale.supervisor.story import REJECTIONS, Story, joined

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ClusterShape(slices=2, hosts_per_slice=1, devices_per_host=1, spares=0, restart_after=1.0)


def told(story, lines):
    return [s for line in lines for s in story.tell(("event" if "kind" in line else "metrics", line))]


def running(hosts=2):
    """A story of 20 steps, the last of them at 10 s."""
    story = Story()
    told(story, [*began(hosts=hosts), *(metrics(8 + step / 10, step) for step in range(1, 21))])
    return story


# The lines


def test_a_follower_gives_whole_new_lines_in_the_order_of_their_times(tmp_path):
    follower = Follower(tmp_path)
    assert follower.new() == [], "no file yet"
    write(tmp_path, [event(3, "done"), metrics(1, 1), metrics(4, 2)])
    assert [line.get("kind", line.get("step")) for _, line in follower.new()] == [1, "done", 2]
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'no json\n["no object"]\n{"no": "step"}\n{"step": 3, "ti')
    assert follower.new() == []
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'me": 5.0, "loss": null, "nonfinite": {"loss": "nan"}}\n')
    [(source, line)] = follower.new()
    assert (source, line["step"]) == ("metrics", 3)
    assert line["loss"] != line["loss"], "NaN comes back"
    (tmp_path / EVENTS).write_text(json.dumps(event(0, "a")) + "\n")
    assert [line["kind"] for _, line in follower.new()] == ["a"], "another file under the same name"


def test_a_follower_of_what_comes_from_now_on(tmp_path):
    write(tmp_path, [event(1, "done"), metrics(1, 1)])
    follower = Follower(tmp_path, offsets_of(tmp_path))
    write(tmp_path, [metrics(2, 2)])
    assert [line["step"] for _, line in follower.new()] == [2]
    length = len((tmp_path / METRICS).read_bytes())
    assert tail_offset(tmp_path / METRICS, length) == tail_offset(tmp_path / "absent", 5) == 0
    offset = tail_offset(tmp_path / METRICS, length - 5)
    assert (tmp_path / METRICS).read_bytes()[offset:].startswith(b'{"step": 2')


# A fault


def test_a_fault_is_two_lines_what_and_how_long():
    story = running()
    lines = told(story, [*fault(11.0), *recovery(11.3, 2, 20), metrics(12.4, 21, 2), metrics(12.5, 22, 2)])
    assert lines == [
        f"fault: {KILLED} (recoverable)",
        "back after 1.4 s at step 21: epoch 2, 2 hosts, restored from memory (0 steps replayed)",
    ]
    [one] = story.faults()
    assert (one.back_step, one.host, one.fault_class) == (21, "host-1", "recoverable")


def test_replaying_is_not_yet_going_on():
    story = running()
    replay = [metrics(12 + step / 100, step, 2) for step in range(16, 21)]
    assert told(story, [*fault(11.0), *recovery(11.3, 2, 15, sources=(("peer", 4),)), *replay])[1:] == []
    assert story.is_standing()
    assert told(story, [metrics(13.0, 21, 2)]) == [
        "back after 2.0 s at step 21: epoch 2, 2 hosts, restored from memory of its peers (5 steps replayed)"
    ]
    assert not story.is_standing()


def test_the_old_epochs_last_line_may_come_late():
    story = running()
    assert told(story, [*fault(11.0), metrics(11.1, 21)])[1:] == []
    assert told(story, [*recovery(11.3, 2, 20), metrics(12.0, 21, 2)]) == [], "21 was reached before"
    assert "at step 22" in told(story, [metrics(12.1, 22, 2)])[0]


def test_a_restart_without_any_checkpoint_says_so():
    story = running()
    lines = [*fault(11.0), *workers(11.5, 2), *(metrics(12 + step, step, 2) for step in range(1, 22))]
    assert "epoch 2, 2 hosts, from the start: nothing was saved yet" in told(story, lines)[-1]


@pytest.mark.parametrize(
    ("kind", "cause"), [("worker_hung", "worker of host-1 hangs"), ("host_lost", "host-1 is lost")]
)
def test_the_time_before_a_silent_fault_was_noticed_counts(kind, cause):
    story = running()
    evidence = [{"kind": kind, "host": "host-1", "epoch": 1, "seconds": 4.0}]
    lines = told(story, [*fault(15.0, cause, evidence=evidence), *recovery(15.5, 2, 20), metrics(16.0, 21, 2)])
    assert lines[1].startswith("back after 5.0 s at step 21")


def test_a_fault_during_recovery_is_a_line_and_both_end_together():
    story = running()
    second = "worker of host-0 was ended by SIGSEGV in restore after 20 updates"
    again = fault(12.0, second, evidence=[exited("host-0", epoch=2)], epoch=2)
    lines = told(story, [*fault(11.0), *recovery(11.3, 2, 20), *again, *recovery(12.3, 3, 20), metrics(13.5, 21, 3)])
    assert [line.partition(":")[0] for line in lines] == [
        "fault",
        "fault",
        "back after 2.5 s since the first of 2 at step 21",
    ]
    assert [one.seconds(0) for one in story.faults()] == [2.5, 1.5]
    assert survived(story.interruptions) == "; survived 2 faults: 2.5 s without training", "no second counts twice"


def test_a_fatal_fault_ends_the_story():
    story = running()
    lines = told(story, [*fault(11.0, fault_class="fatal"), state(11.3, "DECIDING", "ESCALATED", "same error twice")])
    assert lines == [f"fault: {KILLED} (fatal)"]
    assert story.ended == "failed"
    assert survived(story.interruptions) == ""


def test_the_same_said_of_several_workers_is_said_once():
    hang = "hangs in step after 58 updates (4.4 s, limit 4.3 s)"
    assert joined(f"worker of host-0 {hang}; worker of host-2 {hang}") == f"each worker of host-0, host-2 {hang}"
    mixed = f"{KILLED}; host-0 is lost: no heartbeat for 2.0 s"
    assert joined(mixed) == mixed


# What is no fault


def test_a_resize_and_its_time():
    story = running()
    sizes = {"slices_before": 2, "slices_after": 1, "reason": "2 hosts before, 1 now"}
    lost = [{"kind": "host_lost", "host": "host-1", "epoch": 1, "seconds": 2.0}]
    shrunk = [*fault(12.0, "host-1 is lost", evidence=lost), event(12.3, "resized", **sizes), *recovery(12.4, 2, 20, 1)]
    assert told(story, [*shrunk, metrics(13.0, 21, 2)])[1:] == [
        "resized: 2 hosts before, 1 now (slices: 2 before, 1 now)",
        "back after 3.0 s at step 21: epoch 2, 1 host, restored from memory (0 steps replayed)",
    ]
    grows = [state(20.0, "RUNNING", "DRAINING", "a larger world can be formed", 2), metrics(20.5, 22, 2)]
    assert told(story, [event(19, "agent_started", 2, pid=99, host="host-1", slice=1), *grows]) == [
        "the agent of host-1 was started again",
        "resize: a larger world can be formed",
    ]
    lines = told(story, [*recovery(20.8, 3, 22), metrics(21.5, 23, 3)])
    assert lines == ["back after 1.0 s at step 23: epoch 3, 2 hosts, restored from memory (0 steps replayed)"], (
        "a handover costs what lies between two steps, not what the workers still did after they were told"
    )
    assert survived(story.interruptions) == "; survived 1 fault, 1 resize: 4.0 s without training"


def test_a_preemption_is_said_once_and_a_stop_is_no_fault():
    story = running()
    detail = "host-1 was told to end"
    preempted = [event(11, "alarm", what="preemption", detail=detail), state(11, "RUNNING", "DRAINING", detail)]
    lines = told(story, [*preempted, *recovery(11.5, 2, 20, 1), metrics(12.0, 21, 2)])
    assert lines[0] == f"preemption: {detail}"
    assert len(lines) == 2
    assert told(story, [state(13, "RUNNING", "DRAINING", "SIGINT", 2)]) == [
        "stopping (SIGINT): the workers save and end"
    ]
    told(story, [state(14, "DRAINING", "DONE", "stopped (SIGINT) and saved", 2)])
    assert story.ended == "stopped"
    assert not story.faults()


def test_a_coordinator_that_comes_back_disturbs_nobody():
    story = running()
    again = [event(11, "coordinator_started", pid=2, host="vm", address="x")]
    again += [event(11.1, "agent_started", pid=10 + i, host=f"host-{i}", slice=i) for i in range(2)]
    again += [state(11.2, "WAITING", "RUNNING", "epoch 1 was found running")]
    assert told(story, again) == ["the coordinator is back: epoch 1 was found running, no worker was disturbed"]
    assert not story.is_standing()


def test_a_coordinator_that_dies_in_a_recovery_leaves_the_fault_open():
    story = running()
    told(story, fault(11.0))
    again = [event(11.5, "coordinator_started", pid=2, host="vm", address="x")]
    again += [event(11.6, "agent_started", pid=10 + i, host=f"host-{i}", slice=i) for i in range(2)]
    again += [state(11.7, "WAITING", "DECIDING", "enough hosts are there")]
    assert "back after 2.0 s" in told(story, [*again, *recovery(12, 2, 20), metrics(13, 21, 2)])[-1]


def test_a_new_start_of_the_run_is_no_recovery_of_what_ended_the_old_one():
    story = running()
    told(
        story,
        [*fault(11.0), event(11.1, "sealed", tier="memory", step=20), event(11.1, "sealed", tier="durable", step=9)],
    )
    agents = [event(50.1, "agent_started", pid=70 + i, host=f"host-{i}", slice=i) for i in range(2)]
    start = [event(50, "coordinator_started", pid=5, host="vm", address="x"), *agents]
    start += [state(50.2, "WAITING", "DECIDING", "enough hosts are there")]
    lines = told(story, [*start, *recovery(51, 2, 9, sources=(("durable", 9),)), metrics(52, 21, 2)])
    assert lines == ["restored step 9 from the durable checkpoint"]
    assert story.sealed.keys() == {"durable"}, "the memory went with the old processes"
    assert story.faults()[0].is_cut


def test_alarms_and_damaged_copies_do_not_flood():
    story = running()
    alarm = event(11, "alarm", what="connection refused", detail="x")
    assert told(story, [alarm, alarm]) == ["alarm: connection refused: x"]
    fields = {"tier": "memory", "step": 20, "path": "host-1:gen-0", "shard": "w ((0, 8),)", "reason": "digest"}
    lines = told(story, [event(12, "rejected", **fields)] * 50)
    assert len(lines) == REJECTIONS
    assert lines[0] == "damaged: memory copy of step 20, host-1:gen-0 w ((0, 8),): digest; another is used"


def test_events_of_another_version_cost_a_line_and_not_the_view():
    story = running()
    odd = [event(11, "fault"), event(11, "state", **{"from": 1}), {"time": "x", "kind": "restored"}, event(11, "_step")]
    assert told(story, odd) == []
    assert "back after" in told(story, [*fault(12), *recovery(12.5, 2, 20), metrics(13, 21, 2)])[-1]


# What launch prints


def show_of(run, stream, steps=30):
    config = load_recipe(ROOT / "recipes" / "lm_nano.py").config
    run_config = dataclasses.replace(config.run, dir=str(run))
    return Show(dataclasses.replace(config, steps=steps, run=run_config), SHAPE, stream)


def test_the_screen_of_a_run_with_a_fault(tmp_path):
    run, stream = tmp_path / "run", io.StringIO()
    write(run, [metrics(0, 7), *fault(0.5)])  # of an earlier start
    show = show_of(run, stream)
    show.poll(1)
    (run / ".lock").write_text("pid 2 on vm\n")
    show.poll(1)
    assert stream.getvalue() == "", "another process has locked the directory"
    (run / ".lock").write_text("pid 1 on vm\n")
    write(run, [*began(1), *(metrics(8 + step / 10, step) for step in range(1, 21)), *fault(11)])
    show.poll(1)
    write(run, [*recovery(11.5, 2, 15), *(metrics(12 + step / 100, step, 2) for step in range(16, 31))])
    show.finish(1, 0)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == [
        "lm_nano",
        "  model   vocabulary 512, layers 2, width 128, heads 4, mlp 256",
        "  cluster 2 slices x 1 host x 1 device",
    ]
    assert "compiling the program of step 1" in lines[8]
    assert lines[9].startswith("step 1/30  loss 2.0000")
    at = lines.index(f"fault: {KILLED} (recoverable)")
    assert lines[at + 1].startswith("back after 1.2 s at step 21: epoch 2, 2 hosts")
    assert lines[at + 2].startswith("step 21/30"), "what was replayed is no progress"
    assert lines[-1] == f"done: 30 steps trained and saved in {run}; survived 1 fault: 1.2 s without training"
    assert sum(line.startswith("fault") for line in lines) == 1, "the one of the earlier start is not shown"


def test_after_a_failure_nothing_follows_the_coordinators_words(tmp_path):
    run, stream = tmp_path / "run", io.StringIO()
    show = show_of(run, stream)
    write(run, [*began(), metrics(8, 1), metrics(9, 2), *fault(11, fault_class="fatal")])
    write(run, [state(11.3, "DECIDING", "ESCALATED", "same error twice")])
    (run / ".lock").write_text("pid 1 on vm\n")
    show.poll(1)
    before = stream.getvalue()
    assert before.splitlines()[-2:][0].startswith("fault: ")
    write(run, [metrics(11.4, 3)])
    show.finish(1, 1)
    assert stream.getvalue() == before


@pytest.mark.parametrize(
    ("trained", "saved", "said"),
    [
        (4, [2, 4], "stopped after step 4 of 30; it is saved: the same command again goes on from there"),
        (
            4,
            [1, 2],
            "stopped after step 4 of 30; the newest durable checkpoint is of step 2, the 2 steps after it went with "
            "the hosts' memory: the same command again goes on from the checkpoint",
        ),
        (4, [], "stopped after step 4 of 30; nothing is saved: the same command again starts from step 0"),
        (0, [], "stopped before a step was trained; nothing is saved: the same command again starts from step 0"),
        (0, [9], "stopped before a step was trained; step 9 is saved: the same command again goes on from there"),
    ],
)
def test_a_stopped_run_calls_saved_what_is_saved(tmp_path, trained, saved, said):
    run, stream = tmp_path / "run", io.StringIO()
    show = show_of(run, stream)
    write(run, [*began(), *(metrics(8 + step, step) for step in range(1, trained + 1))])
    write(run, [state(20, "RUNNING", "DRAINING", "SIGINT"), event(20, "sealed", tier="memory", step=trained)])
    for step in saved:
        folder = step_folder(run / "checkpoints", step)
        folder.mkdir(parents=True)
        (folder / COMMIT_FILE).touch()
        (folder / MANIFEST).touch()
    step_folder(run / "checkpoints", trained + 1).mkdir(parents=True)  # a save that was cut short is none
    (run / ".lock").write_text("pid 1 on vm\n")
    show.finish(1, 75)
    assert stream.getvalue().splitlines()[-1] == said


@pytest.mark.parametrize(
    ("hosts", "replicas", "said"),
    [
        (1, 1, "no copy: there is no other host"),
        (2, 1, "1 copy at other hosts"),
        (2, 3, "1 copy at other hosts, not 3: there are no more hosts"),
        (4, 2, "2 copies at other hosts"),
        (4, 0, "no copy at other hosts"),
    ],
)
def test_the_screen_counts_no_copies_that_cannot_be(hosts, replicas, said):
    config = load_recipe(ROOT / "recipes" / "lm_nano.py").config
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, replicas=replicas, every=5))
    shape = dataclasses.replace(SHAPE, slices=1, hosts_per_slice=hosts, spares=3)
    assert f"  memory  a checkpoint every 5 steps, {said}" in screen(config, shape, Path("run"))


def test_a_refused_run_shows_nothing(tmp_path):
    stream = io.StringIO()
    show = show_of(tmp_path / "run", stream)
    show.finish(1, 2)
    assert stream.getvalue() == ""


class Closed(io.StringIO):
    def write(self, *_):
        raise BrokenPipeError


def test_nobody_reading_does_not_end_the_training(tmp_path):
    run = tmp_path / "run"
    show = show_of(run, Closed())
    write(run, began())
    (run / ".lock").write_text("pid 1 on vm\n")
    show.poll(1)
    write(run, [metrics(8, 1), state(9, "RUNNING", "ESCALATED", "a bug")])
    show.poll(1)
    assert (show.step, show.verdict) == (1, 1), "what the launcher goes by is followed all the same"
    show.finish(1, 0)


def test_the_run_directory_is_found_by_the_lock_where_its_name_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    show = show_of("", stream)
    for name, pid in (("lm_nano-1", 7), ("lm_nano-2", 1), ("lm_tiny-3", 1)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / ".lock").write_text(f"pid {pid} on vm\n")
    show.poll(1)
    assert "run     runs/lm_nano-2 (watch it with: jaxscale status runs/lm_nano-2 --watch)" in stream.getvalue()


def test_showing_imports_no_jax():
    code = "import sys, jaxscale.supervisor.launch, jaxscale.supervisor.status; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
