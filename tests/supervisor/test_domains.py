"""Many reports, one failure: causes, victims, and the domain that was lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.supervisor.domains import (
    LEASE_SECONDS,
    LONG_WINDOW_SECONDS,
    WINDOW_SECONDS,
    Observation,
    closes_at,
    group,
)
from jaxscale.supervisor.evidence import (
    AgentRefused,
    EpochHostLost,
    HostLost,
    PhaseExpired,
    ShardRejected,
    WorkerError,
    WorkerExit,
    WorkerHung,
)

SLICES = {"host-0": 0, "host-1": 0, "host-2": 1, "host-3": 1}


def killed(index, number=9, **more):
    return WorkerExit(f"host-{index}", index, 1, signal=number, section="step", step=5, **more)


def reset(index):
    text = "Gloo all-reduce failed: Connection reset by peer"
    return WorkerError(f"host-{index}", index, 1, "JaxRuntimeError", text, section="step", step=5, collective=True)


def hung(index, section="step", step=5):
    return WorkerHung(f"host-{index}", index, 1, section, step, 2.0, 1.0)


def lost(index):
    return HostLost(f"host-{index}", 1, 2.0)


def raised(index, **more):
    return WorkerError(f"host-{index}", index, 1, "ValueError", "bad row", section="step", step=5, **more)


def grouped(*evidence):
    found = group(evidence, SLICES)
    assert set(found.causes) | set(found.victims) == set(evidence)
    assert not set(found.causes) & set(found.victims)
    return found


def test_survivors_of_a_killed_worker_are_victims():
    found = grouped(reset(0), reset(3), killed(1), hung(2))
    assert (found.causes, found.hosts, found.domain) == ((killed(1),), ("host-1",), "worker")


def test_our_own_killing_is_nobodys_fault():
    found = grouped(killed(0), killed(1, fenced=True), killed(2, fenced=True))
    assert found.hosts == ("host-0",)
    nothing = grouped(killed(1, fenced=True))
    assert (nothing.causes, nothing.hosts) == ((), ())


def test_a_lost_host_takes_its_worker_along():
    late = PhaseExpired(1, "FORMING", 10.0, ("host-2",))
    found = grouped(reset(0), killed(2), hung(2), lost(2), late)
    assert (found.causes, found.domain, found.lost, found.slices) == ((lost(2),), "host", ("host-2",), ())


def test_a_slice_is_lost_when_all_its_hosts_are():
    found = grouped(lost(3), reset(0), lost(2))
    assert (found.domain, found.hosts, found.slices) == ("slice", ("host-3", "host-2"), (1,))
    across = grouped(lost(1), lost(2))
    assert (across.domain, across.slices) == ("host", ())


def test_a_lost_host_and_a_killed_worker_elsewhere_are_two_causes():
    found = grouped(killed(0), lost(2), reset(1))
    assert found.causes == (lost(2), killed(0))
    assert found.hosts == ("host-2", "host-0")
    assert found.lost == ("host-2",)


def test_the_coordination_service_takes_all_workers_along():
    service = EpochHostLost("host-0", 1, signal=9)
    found = grouped(*(killed(i, 6) for i in range(4)), service)
    assert (found.causes, found.hosts, found.domain) == ((service,), (), "world")
    aborted = WorkerExit("host-2", 2, 1, exit_code=134)
    assert grouped(service, aborted).causes == (service,)
    # But a worker that was killed in the same moment is a cause of its own.
    assert grouped(service, killed(2)).hosts == ("host-2",)
    # And a lost host explains its service.
    assert grouped(service, lost(0), killed(1, 6)).causes == (lost(0),)
    # Also where nobody is left who could tell of the service, and other crashes stay what they are.
    assert grouped(lost(0), killed(1, 6)).causes == (lost(0),)
    assert set(grouped(lost(0), killed(1, 11)).causes) == {lost(0), killed(1, 11)}


def test_a_collective_that_failed_for_no_reason_is_nobodys_fault():
    found = grouped(reset(0), reset(3))
    assert (set(found.causes), found.hosts, found.domain) == ({reset(0), reset(3)}, (), "world")


def test_a_worker_that_ends_by_a_failed_collective_is_a_victim_too():
    ended = WorkerExit("host-1", 1, 1, 1, None, "JaxRuntimeError", "Gloo", section="step", step=5, collective=True)
    assert grouped(ended, killed(0)).hosts == ("host-0",)


def test_of_hung_workers_the_odd_one_is_the_cause():
    assert grouped(hung(0), hung(1), hung(2, "data"), hung(3)).hosts == ("host-2",)
    assert grouped(hung(0), hung(1), hung(2, step=4), hung(3)).hosts == ("host-2",)
    assert grouped(hung(0), hung(1)).hosts == ("host-0", "host-1")
    # Beside a dead worker only those count that hang in work of their own.
    assert grouped(hung(0), hung(1, "data"), killed(3)).hosts == ("host-3", "host-1")


def test_a_phase_that_expires_is_explained_by_what_happened_in_it():
    late = PhaseExpired(1, "WARMING", 60.0, ("host-1", "host-2"))
    assert grouped(late, reset(0)).hosts == ("host-1", "host-2")
    assert grouped(late, killed(1)).hosts == ("host-1",)
    assert grouped(late, raised(3)).hosts == ("host-3",)


def test_who_could_not_restore_from_a_damaged_shard_is_a_victim():
    shard = ShardRejected("host-3", 1, "memory", 4, "params/w", "0:8", "digest")
    error = WorkerError("host-1", 1, 1, "DamagedCheckpoint", "digest", section="restore")
    assert grouped(error, shard).causes == (shard,)
    assert grouped(raised(1), shard).causes == (raised(1), shard)


def test_every_host_that_raised_is_named():
    assert grouped(raised(0), raised(1), raised(2), reset(3)).hosts == ("host-0", "host-1", "host-2")


def test_what_an_earlier_world_saw_is_left_out():
    found = group([killed(0), HostLost("host-1", 2, 2.0)], SLICES, epoch=2)
    assert (found.hosts, found.victims) == (("host-1",), ())


# When to decide


def observed(*evidence, start=100.0):
    return [Observation(start + 0.01 * i, e) for i, e in enumerate(evidence)]


def test_the_window_opens_with_the_first_evidence():
    assert closes_at([], SLICES) is None
    assert closes_at(observed(killed(0), reset(1)), SLICES) == 100.0 + WINDOW_SECONDS


def test_it_stays_open_while_more_is_about_to_come():
    assert closes_at(observed(lost(2)), SLICES) == 100.0 + LONG_WINDOW_SECONDS
    assert closes_at(observed(lost(2), lost(3)), SLICES) == 100.0 + WINDOW_SECONDS
    assert closes_at(observed(reset(0)), SLICES) == 100.0 + LONG_WINDOW_SECONDS
    assert closes_at(observed(reset(0)), SLICES, silent=["host-2"]) == 100.0 + LEASE_SECONDS
    assert closes_at(observed(reset(0), killed(1)), SLICES, silent=["host-2"]) == 100.0 + WINDOW_SECONDS


MAKERS = (killed, reset, hung, lost, raised)
SOME = st.lists(
    st.builds(lambda make, index: make(index), st.sampled_from(MAKERS), st.integers(0, 3))
    | st.builds(lambda i: killed(i, fenced=True), st.integers(0, 3))
    | st.just(EpochHostLost("host-1", 1, signal=9))
    | st.just(PhaseExpired(1, "FORMING", 9.0, ("host-3",)))
    | st.just(AgentRefused("host-2", 1, "another version"))
    | st.just(ShardRejected("host-0", 1, "memory", 4, "params/w", "0:8", "digest")),
    max_size=8,
    unique=True,
)


@given(SOME, st.randoms())
def test_the_order_of_the_reports_does_not_matter(evidence, random):
    found = grouped(*evidence)
    shuffled = list(evidence)
    random.shuffle(shuffled)
    again = grouped(*shuffled)
    assert (set(again.causes), set(again.hosts), again.domain) == (set(found.causes), set(found.hosts), found.domain)


@given(SOME)
def test_something_is_always_the_cause_and_survivors_never_are(evidence):
    found = grouped(*evidence)
    if any(not getattr(e, "fenced", False) for e in evidence):
        assert found.causes
    for host in found.hosts:
        seen = [e for e in evidence if host in ([*e.missing] if isinstance(e, PhaseExpired) else [e.host])]
        assert any(
            not getattr(e, "collective", False) and not getattr(e, "fenced", False) and not isinstance(e, EpochHostLost)
            for e in seen
        )


@pytest.mark.parametrize("make", MAKERS)
def test_one_report_is_enough(make):
    assert grouped(make(1)).causes == (make(1),)
