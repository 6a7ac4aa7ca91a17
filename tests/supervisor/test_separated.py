"""Coordinators that are gone for good, and partitions between network namespaces: real processes, real silence."""

import os
import signal
from pathlib import Path

import pytest

from jaxscale.supervisor.states import DEPOSED
from jaxscale.testing import namespaces
from jaxscale.testing.separated import separated

RECIPE = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
MISSING = namespaces.unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
FLAGS = ("--memory.every", 2, "--checkpoint.every", 0)


def last_term(cluster):
    return cluster.events("elected")[-1]["term"]


def committed(cluster):
    """(step, epoch) of what is committed."""
    return [(line["step"], line["epoch"]) for line in cluster.metrics()]


def test_the_death_of_the_coordinator_alone_disturbs_no_worker(tmp_path):
    with separated(RECIPE, tmp_path / "run", *FLAGS, "--steps", 300) as cluster:
        cluster.wait_for_step(20)
        os.killpg(cluster.process.pid, signal.SIGKILL)
        elected = cluster.wait_for(lambda: cluster.events("elected")[1:] or None, "an election")
        assert elected[0]["term"][0] > 1  # one higher for each candidate before it
        assert cluster.finish() == 0
        assert {epoch for _, epoch in committed(cluster)} == {1}
        assert len(cluster.events("worker_started")) == 4
        assert [e["kind"] for e in cluster.events()][-1] == "done"


def test_the_loss_of_the_coordinators_whole_namespace_disturbs_no_worker(tmp_path):
    with separated(RECIPE, tmp_path / "run", *FLAGS, "--steps", 300, apart=True) as cluster:
        cluster.wait_for_step(20)
        cluster.net.cut([4], [0, 1, 2, 3])
        os.killpg(cluster.process.pid, signal.SIGKILL)
        cluster.wait_for(lambda: cluster.events("elected")[1:] or None, "an election")
        assert cluster.finish() == 0
        assert [step for step, _ in committed(cluster)] == list(range(1, 301))
        assert {epoch for _, epoch in committed(cluster)} == {1}
        assert len(cluster.events("worker_started")) == 4


def test_of_two_halves_one_goes_on_and_the_other_commits_nothing(tmp_path):
    with separated(RECIPE, tmp_path / "run", *FLAGS, "--steps", 500) as cluster:
        cluster.wait_for_step(20)
        cluster.net.cut([0, 1], [2, 3])
        cluster.wait_for_step(40, epoch=2, seconds=60)
        members = sorted(e["host"] for e in cluster.events("worker_started", epoch=2))
        assert members in (["host-0", "host-1"], ["host-2", "host-3"])
        cluster.net.heal()
        cluster.wait_for(lambda: True if cluster.members() == 4 else None, "a world of 4", 120)
        assert cluster.finish() == 0
        assert [step for step, _ in committed(cluster)] == list(range(1, 501))
        assert not cluster.late_writes()


def test_another_host_takes_over_when_the_coordinators_host_is_gone(tmp_path):
    with separated(RECIPE, tmp_path / "run", *FLAGS, "--steps", 400) as cluster:
        cluster.wait_for_step(20)
        os.killpg(cluster.process.pid, signal.SIGKILL)
        cluster.kill_host("host-0")
        cluster.wait_for_step(40, epoch=2, seconds=60)
        assert last_term(cluster)[0] > 1
        assert sorted(e["host"] for e in cluster.events("worker_started", epoch=2)) == ["host-2", "host-3"]
        assert cluster.finish() == 0
        assert [step for step, _ in committed(cluster)] == list(range(1, 401))


def test_a_host_that_is_cut_off_ends_its_worker_and_comes_back(tmp_path):
    with separated(RECIPE, tmp_path / "run", *FLAGS, "--steps", 500) as cluster:
        cluster.wait_for_step(20)
        _, pid = cluster.worker(3)
        cluster.net.cut([3], [0, 1, 2])
        cluster.wait_for_step(21, epoch=2, seconds=60)
        assert cluster.members() == 2
        cluster.wait_for(lambda: True if not Path(f"/proc/{pid}").exists() else None, "the end of its worker", 30)
        assert not cluster.events("worker_started", epoch=3)
        cluster.net.heal()
        cluster.wait_for_step(0, epoch=3, seconds=60)
        assert cluster.members() == 4
        assert cluster.finish() == 0
        assert [step for step, _ in committed(cluster)] == list(range(1, 501))
        assert not cluster.late_writes(), "the minority commits nothing"


def test_a_coordinator_on_the_minority_side_does_nothing_more(tmp_path):
    with separated(RECIPE, tmp_path / "run", *FLAGS, "--steps", 500) as cluster:
        cluster.wait_for_step(20)
        first = cluster.process
        cluster.net.cut([0], [1, 2, 3])
        cluster.wait_for_step(21, epoch=2, seconds=60)
        assert last_term(cluster)[0] > 1
        assert sorted(e["host"] for e in cluster.events("worker_started", epoch=2)) == ["host-2", "host-3"]
        cluster.net.heal()
        cluster.wait_for(lambda: True if first.poll() is not None else None, "the end of the old coordinator", 60)
        assert first.returncode == DEPOSED
        cluster.wait_for_step(0, epoch=3, seconds=90)
        assert cluster.members() == 4
        assert cluster.finish() == 0
        assert [step for step, _ in committed(cluster)] == list(range(1, 501))
        assert not cluster.late_writes(), "the minority commits nothing"
