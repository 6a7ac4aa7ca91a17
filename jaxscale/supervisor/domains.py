"""One failure seen from many places: which evidence names a cause, which only a victim, and how much was lost together.

A dead worker makes its peers' collectives fail, a lost host takes its worker along, a slice loses all its hosts within
half a second, and we ourselves kill every worker when we fence an epoch. Judged one by one, these would be many faults
of innocent hosts. So evidence is gathered for a moment (`closes_at`), then sorted once (`group`). Read next:
`policy.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxscale.supervisor.evidence import (
    AgentRefused,
    EpochHostLost,
    Evidence,
    HostLost,
    PhaseExpired,
    ShardRejected,
    WorkerError,
    WorkerExit,
    WorkerHung,
    hosts_of,
)
from jaxscale.supervisor.limits import Kind, Position, odd_ones

WINDOW_SECONDS = 0.2
"""How long evidence is gathered after the first."""

LONG_WINDOW_SECONDS = 0.5
"""The same where more is about to come: part of a slice is lost, or only victims have spoken so far."""

LEASE_SECONDS = 2.5
"""The same where only victims have spoken and a host is silent: when its lease ends, it is the cause."""

Domain = Literal["worker", "host", "slice", "world"]

SIGABRT = 6


@dataclass(frozen=True)
class Observation:
    """Evidence, and when it came: monotonic seconds of the coordinator's clock."""

    seconds: float
    evidence: Evidence


@dataclass(frozen=True)
class Group:
    """One failure."""

    causes: tuple[Evidence, ...]
    """The worst kind first; empty when there was nothing but our own killing."""
    victims: tuple[Evidence, ...]
    """Consequences of the causes; nobody is charged for them."""
    domain: Domain
    hosts: tuple[str, ...]
    """To blame; empty where no host is (a collective failed and nobody knows why)."""
    slices: tuple[int, ...] = ()
    """Slices that lost all their hosts."""

    @property
    def lost(self) -> tuple[str, ...]:
        """Hosts that are gone with everything on them."""
        return tuple(dict.fromkeys(e.host for e in self.causes if isinstance(e, HostLost)))


def closes_at(
    observations: Sequence[Observation], slices: Mapping[str, int], silent: Collection[str] = ()
) -> float | None:
    """When to stop gathering and decide; None while there is nothing to gather for.

    slices: host -> slice of every member. silent: members whose heartbeat is late, though their lease still holds.
    """
    if not observations:
        return None
    first = min(o.seconds for o in observations)
    found = group([o.evidence for o in observations], slices)
    broken = {slices[host] for host in found.lost if host in slices}
    partly = any(slices[host] in broken and host not in found.lost for host in slices)
    if _blameless(found):
        return first + (LEASE_SECONDS if silent else LONG_WINDOW_SECONDS)
    return first + (LONG_WINDOW_SECONDS if partly else WINDOW_SECONDS)


def group(evidence: Sequence[Evidence], slices: Mapping[str, int], epoch: int | None = None) -> Group:
    """Sorts what was gathered. `slices`: host -> slice of every member.

    epoch: what was seen in another one is left out; None takes all.
    """
    seen = [e for e in dict.fromkeys(evidence) if epoch is None or e.epoch == epoch]
    blamed = _causes(seen)
    lost = {e.host for e in seen if isinstance(e, HostLost)}
    causes = tuple(sorted(blamed, key=_severity))
    hosts = _blamed_hosts(causes)
    gone = tuple(
        index
        for index in sorted(set(slices.values()))
        if lost.issuperset(host for host, own in slices.items() if own == index)
    )
    return Group(
        causes=causes,
        victims=tuple(e for e in seen if e not in blamed),
        domain="slice" if gone else "host" if lost else "worker" if hosts else "world",
        hosts=hosts,
        slices=gone,
    )


def is_collective(evidence: Evidence) -> bool:
    """Whether it only says that others did not take part any more."""
    return isinstance(evidence, WorkerExit | WorkerError) and evidence.collective


def _causes(seen: Sequence[Evidence]) -> list[Evidence]:
    """The strongest explanation of what was seen, from the whole host down to a collective that failed for no reason.

    Whatever is not a cause is one's consequence.
    """
    lost = {e.host for e in seen if isinstance(e, HostLost)}
    own = [e for e in seen if not (isinstance(e, WorkerExit) and e.fenced)]
    # What a lost host had said before, and a phase that it did not finish, are part of its loss.
    rest = [e for e in own if isinstance(e, HostLost) or not lost.intersection(hosts_of(e))]
    service = [e for e in own if isinstance(e, EpochHostLost)]
    if service or lost:
        # JAX's clients abort when their service is gone, or one of them is; both are gone with their host.
        rest = [e for e in rest if not (isinstance(e, WorkerExit) and e.ended_by == SIGABRT)]
    if any(isinstance(e, ShardRejected) for e in rest):
        # Whoever was to restore from the damaged shard could not.
        rest = [e for e in rest if not (isinstance(e, WorkerExit | WorkerError) and e.section == "restore")]
    failed = [e for e in rest if not (is_collective(e) or isinstance(e, WorkerHung | PhaseExpired))]
    failed_hosts = {host for e in failed for host in hosts_of(e)}
    # A worker that hangs in its own work is a cause beside a dead one; one that waits in a step is its victim.
    hung = _hung([e for e in rest if isinstance(e, WorkerHung)], others_failed=bool(failed))
    if failed or hung:
        return [*failed, *(e for e in hung if e.host not in failed_hosts)]
    if expired := [e for e in rest if isinstance(e, PhaseExpired)]:
        return list(expired)
    return [e for e in rest if is_collective(e)]


def _hung(hung: list[WorkerHung], others_failed: bool) -> list[WorkerHung]:
    if others_failed:
        return [e for e in hung if e.section == "data"]
    if stopped := [e for e in hung if e.stopped]:
        return stopped
    positions = [Position(e.host, Kind(e.section), e.step, 0.0, e.rank) for e in hung]
    odd = {position.host for position in odd_ones(positions)}
    return [e for e in hung if e.host in odd]


def _severity(evidence: Evidence) -> int:
    order = (HostLost, EpochHostLost, WorkerExit, WorkerError, WorkerHung, AgentRefused, PhaseExpired, ShardRejected)
    return order.index(type(evidence))


def _blamed_hosts(causes: Sequence[Evidence]) -> tuple[str, ...]:
    """Hosts of the causes; not those where only a service of the whole world ran, or a collective failed."""
    innocent = [e for e in causes if is_collective(e) or isinstance(e, EpochHostLost)]
    return tuple(dict.fromkeys(host for e in causes if e not in innocent for host in hosts_of(e)))


def _blameless(found: Group) -> bool:
    return all(is_collective(e) for e in found.causes)
