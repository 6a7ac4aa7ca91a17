"""The chaos command without a cluster: its schedule, and what it refuses."""

import random
import subprocess
import time
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.chaos.faults import KINDS, flip, truncate
from jaxscale.chaos.run import came_late
from jaxscale.chaos.schedule import schedule
from jaxscale.cli import main
from jaxscale.supervisor.process_stat import STATE, stat_of

NAMES = tuple(KINDS)


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_a_schedule_is_a_function_of_its_seed(seed, faults):
    strikes = schedule(seed, faults, NAMES, 3, 9)
    assert strikes == schedule(seed, faults, NAMES, 3, 9)
    assert len(strikes) == faults
    assert all(3 <= strike.after_steps <= 9 for strike in strikes)
    counts = [sum(strike.kind == kind for strike in strikes) for kind in NAMES]
    assert max(counts) - min(counts) <= 1  # every kind before one comes again


def test_other_seeds_give_other_schedules():
    assert len({schedule(seed, 10, NAMES, 1, 30) for seed in range(20)}) == 20


def test_flip_changes_one_bit_behind_the_header(tmp_path):
    slot = tmp_path / "gen-0"
    slot.write_bytes(bytes(20_000))
    flip(slot, random.Random(3))
    data = slot.read_bytes()
    assert sum(byte.bit_count() for byte in data) == 1
    assert not any(data[:4096])


def test_truncate_leaves_less_of_a_slot_than_there_was(tmp_path):
    slot = tmp_path / "gen-0"
    sizes = set()
    for seed in range(20):
        slot.write_bytes(bytes(20_000))
        truncate(slot, random.Random(seed))
        sizes.add(slot.stat().st_size)
    assert max(sizes) < 20_000
    assert 0 in sizes
    assert any(0 < size < 4096 for size in sizes)
    assert any(size > 4096 for size in sizes)


def fault(time, *evidence):
    return {"kind": "fault", "time": time, "evidence": [{"kind": kind, "host": host} for kind, host in evidence]}


def started(host, time):
    return {"kind": "agent_started", "host": host, "time": time}


LOST = ("host_lost", "host-1")


@pytest.mark.parametrize(
    ("since", "late"),
    [
        ([fault(3.0, LOST, ("worker_exit", "host-2")), started("host-1", 4.0)], True),
        ([started("host-1", 2.0), fault(3.0, LOST)], False),  # it was there and was not heard
        ([fault(3.0, LOST), started("host-2", 4.0)], False),
        ([fault(3.0, LOST)], False),
        ([fault(3.0, ("worker_exit", "host-1")), started("host-1", 4.0)], False),
        ([fault(3.0, LOST), started("host-1", 4.0), fault(5.0, ("worker_exit", "host-2"))], False),
        ([started("host-1", 4.0)], False),
    ],
)
def test_only_an_agent_that_was_not_there_in_time_excuses_a_new_epoch(since, late):
    assert came_late(since) is late


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kinds", "kil"), "there is no kind of fault 'kil'; kinds are kill, "),
        (("--slices", "1", "--kinds", "slice"), "with --slices 1 there is no other"),
        (("--faults", "0"), "--faults is 0; use 1 or more"),
        (("--least", "9", "--most", "3"), "--most 3 is less than --least 9"),
        (("--seeds", "3"), "unknown flag --seeds; did you mean --seed?"),
    ],
)
def test_bad_flags_are_refused(capsys, flags, message):
    assert main(["chaos", "recipes/lm_nano.py", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_lost_slice_is_one_of_the_cluster_and_not_a_spare_that_stands_in():
    class Cluster:
        hosts: ClassVar = ["host-0", "spare-0", "host-2", "host-3"]

        def members(self):
            return 4

        def worker(self, rank):
            return self.hosts[rank], 7

        def events(self, _kind):
            slices = {"host-0": 0, "host-1": 0, "host-2": 1, "host-3": 1, "spare-0": -1}
            return [{"host": host, "slice": number} for host, number in slices.items()]

        def __init__(self):
            self.lost = []

        def kill_host(self, host):
            self.lost.append(host)

    lost = set()
    for seed in range(20):
        cluster = Cluster()
        KINDS["slice"].hurt(cluster, random.Random(seed))
        lost.add(tuple(cluster.lost))
    assert lost == {("host-0",), ("host-2", "host-3")}


def is_in(process, state):
    """Whether a process comes into this state within some seconds."""
    deadline = time.monotonic() + 10
    while stat_of(process.pid)[STATE] != state and time.monotonic() < deadline:
        time.sleep(0.01)
    return stat_of(process.pid)[STATE] == state


class Paused:
    """A host whose worker was taken over by an agent that was started later, so that it is not its child."""

    def __init__(self):
        self.processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
        self.seen = []

    def members(self):
        return 1

    def worker(self, _):
        return "host-0", self.processes[0].pid

    def agent(self, _):
        return self.processes[1].pid

    def events(self, _):
        return []

    def wait_for(self, *_):
        self.seen = [is_in(process, "T") for process in self.processes]


def test_a_host_is_paused_with_the_worker_that_its_agent_took_over():
    host = Paused()
    try:
        KINDS["pause"].hurt(host, random.Random(0))
        assert host.seen == [True, True]
        assert [is_in(process, "S") for process in host.processes] == [True, True]
        host.processes[0].kill()
        host.processes[0].wait()
        with pytest.raises(ProcessLookupError):
            KINDS["pause"].hurt(host, random.Random(0))
        assert is_in(host.processes[1], "S"), "nothing is stopped in vain"
    finally:
        for process in host.processes:
            process.kill()
            process.wait()
