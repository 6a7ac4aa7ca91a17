"""Supervised runs whose hosts write the durable steps, from memory and beside training."""

import os
import shutil
import signal
import time
from pathlib import Path

from jaxscale.checkpoint.layout import check_files, list_steps, numbered, step_folder
from jaxscale.supervisor.process_stat import children_of
from jaxscale.testing.cluster import launched, left_behind

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
FLAGS = ("--slices", 2, "--hosts-per-slice", 1, "--memory.every", 5, "--checkpoint.every", 20, "--checkpoint.keep", 9)


def persisters(run):
    """Pids of the hosts' persisters."""
    below = [pid for host in ("host-0", "host-1") for pid in children_of(run.agent(host))]
    return [pid for pid in below if b"jaxscale.supervisor.persister" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def durable(run):
    return [event for event in run.events("sealed") if event["tier"] == "durable"]


def wait_for(found, seconds=60):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_whose_persisters_and_workers_are_killed_leaves_whole_steps_and_goes_on_from_one(tmp_path):
    with launched(NANO, tmp_path / "run", *FLAGS, "--steps", 120) as run:
        wait_for(lambda: durable(run))
        first = persisters(run)
        assert len(first) == 2
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(durable(run)) >= 2)
        assert not set(persisters(run)) & set(first)
        os.kill(run.events("worker_started")[0]["pid"], signal.SIGKILL)
        assert run.finish() == 0, run.output
        events = durable(run)
        assert [line["step"] for line in run.metrics()] == list(range(1, 121))
    steps = run.run / "checkpoints"
    assert numbered(steps) == list_steps(steps), "no half of a step is left"
    assert list_steps(steps)[-1] == 120
    assert [event["step"] for event in events] == list_steps(steps)
    assert {event["blocked_seconds"] for event in events[:-1]} == {0.0}
    assert not left_behind(run.run)
    before = {step: check_files(step_folder(steps, step)) for step in list_steps(steps)}
    for step in list_steps(steps)[1:]:
        shutil.rmtree(step_folder(steps, step))
    with launched(NANO, run.run, *FLAGS, "--steps", 120) as again:
        assert again.finish() == 0, again.output
    after = check_files(step_folder(steps, 120))
    digests = {path: [shard.digest for shard in shards] for path, shards in after.shards.items()}
    assert digests == {path: [shard.digest for shard in shards] for path, shards in before[120].shards.items()}
