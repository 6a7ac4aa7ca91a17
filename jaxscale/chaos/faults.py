"""The kinds of faults that chaos knows: how each is done to a running cluster, and what the supervisor must make of it.

Faults come from outside, as real ones do: signals, bytes in shared memory, processes of a host that are gone at once.
Nothing in the program is prepared for them, so there is nothing to leave out in production. To add a kind: a function
that hurts the cluster and says whom, and a row in KINDS. Read next: `schedule.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxscale.supervisor.process_stat import children_of
from jaxscale.supervisor.slot_files import COPIES
from jaxscale.testing.cluster import RunningCluster

HEADER_BYTES = 4096
"""Of a slot, at most: what is damaged lies behind it."""
SPARE = -1
"""The slice that a spare host says it is in."""
SEEN_SECONDS = 60.0
"""Within which the supervisor has to react, where a fault has a second part that waits for that."""

Hurt = Callable[[RunningCluster, random.Random], str]
"""Does it, to whom the random numbers say; returns who was hurt, for people."""


@dataclass(frozen=True)
class FaultKind:
    """One way in which things go wrong."""

    hurt: Hurt
    epochs: bool
    """Whether a new epoch must follow. Without one training goes on as if nothing had happened."""
    classes: tuple[str, ...] = ()
    """`class` of the `fault` events that may follow, the first of which must; empty: none may."""
    about: str = ""
    tells: str = ""
    """Kind of event that must be among those that follow."""
    leaves: bool = False
    """Whether it is no fault but a notice: a host is told to end, the world must go on without it and lose no step."""


class NotYet(Exception):
    """The process to be hurt is not there at this moment, or would not know what the signal means; it will soon."""


def _signal_worker(number: signal.Signals) -> Hurt:
    def hurt(cluster: RunningCluster, draw: random.Random) -> str:
        host, pid = cluster.worker(draw.randrange(cluster.members()))
        os.kill(pid, number)
        return f"{number.name} to the worker of {host}"

    return hurt


def _kill_agent(cluster: RunningCluster, draw: random.Random) -> str:
    host, _ = cluster.worker(draw.randrange(cluster.members()))
    os.kill(cluster.agent(host), signal.SIGKILL)
    return f"SIGKILL to the agent of {host}"


def _kill_zygote(cluster: RunningCluster, draw: random.Random) -> str:
    host, _ = cluster.worker(draw.randrange(cluster.members()))
    os.kill(cluster.zygote(host), signal.SIGKILL)
    return f"SIGKILL to the zygote of {host}"


def _kill_service(cluster: RunningCluster, _: random.Random) -> str:
    host, pid = cluster.service()
    os.kill(pid, signal.SIGKILL)
    return f"SIGKILL to the coordination service on {host}"


def _kill_coordinator(cluster: RunningCluster, _: random.Random) -> str:
    os.kill(cluster.coordinator(), signal.SIGKILL)
    return "SIGKILL to the coordinator"


def _lose_host(cluster: RunningCluster, draw: random.Random) -> str:
    host, _ = cluster.worker(draw.randrange(cluster.members()))
    cluster.kill_host(host)
    return f"{host} gone with its memory"


def _kill_two(cluster: RunningCluster, draw: random.Random) -> str:
    ranks = draw.sample(range(cluster.members()), min(2, cluster.members()))
    victims = [cluster.worker(rank) for rank in ranks]
    for _, pid in victims:
        os.kill(pid, signal.SIGKILL)
    return f"SIGKILL to the workers of {' and '.join(host for host, _ in victims)}"


def _kill_again(cluster: RunningCluster, draw: random.Random) -> str:
    """A worker dies, and one of those that are started for it dies before the recovery is over."""
    ranks = [draw.randrange(cluster.members()) for _ in range(2)]
    state = draw.choice(("FORMING", "RESTORING", "WARMING"))
    first, pid = cluster.worker(ranks[0])
    epoch = max(event["epoch"] for event in cluster.events("worker_started"))
    os.kill(pid, signal.SIGKILL)

    def victim() -> tuple[str, int] | None:
        later = [e for e in cluster.events() if e["epoch"] > epoch]
        started = [e for e in later if e["kind"] == "worker_started"]
        if not started or not any(e["kind"] == "state" and e["to"] == state for e in later):
            return None
        chosen = started[ranks[1] % len(started)]
        return chosen["host"], chosen["pid"]

    second, pid = cluster.wait_for(victim, f"{state} after a kill", SEEN_SECONDS)
    epoch = next(e["epoch"] for e in cluster.events("worker_started") if e["pid"] == pid)
    with contextlib.suppress(ProcessLookupError):  # it may have been fenced: then the recovery had one fault more
        os.kill(pid, signal.SIGKILL)

    def third() -> bool | None:
        return any(e["epoch"] > epoch for e in cluster.events("worker_started")) or None

    # A kill that comes late in the recovery lets the others train a step: this one's end is not the end of the fault.
    cluster.wait_for(third, f"epoch after the {state} of epoch {epoch}", SEEN_SECONDS)
    return f"SIGKILL to the worker of {first}, and in {state} to the one of {second}"


def _cut_off(is_whole: bool) -> Hurt:
    """A host is silent until it counts as lost, then it is back: with a worker of an epoch that is over.

    is_whole: all of its processes stand still, as when a virtual machine is paused, so that none of them can know; else
    its agent alone does.
    """

    def hurt(cluster: RunningCluster, draw: random.Random) -> str:
        host, worker = cluster.worker(draw.randrange(cluster.members()))
        agent, seen = cluster.agent(host), len(cluster.events("fault"))
        stopped = [agent, *children_of(agent)] if is_whole else [agent]
        if is_whole and worker not in stopped:  # an agent that was started again took it over from the one before
            os.kill(worker, 0)  # raises ProcessLookupError before anything is stopped
            stopped.append(worker)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            cluster.wait_for(lambda: len(cluster.events("fault")) > seen or None, f"loss of {host}", SEEN_SECONDS)
            time.sleep(draw.uniform(0.0, 2.0))
        finally:
            for pid in reversed(stopped):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        return f"{host if is_whole else f'the agent of {host}'} stopped until it was missed"

    return hurt


def _lose_partners(cluster: RunningCluster, draw: random.Random) -> str:
    """A host and a peer that holds a copy of its memory: what only they had is on the durable tier, or nowhere."""
    names = [cluster.worker(rank)[0] for rank in range(cluster.members())]
    pairs = [(a, b) for a in names for b in names if a != b and any(_copies(cluster, a, b))]
    if not pairs:
        raise NotYet("no host holds a copy of another one's memory")
    pair = draw.choice(pairs)
    for host in pair:
        cluster.kill_host(host)
    return f"{pair[0]} and {pair[1]}, which held its copies, gone with their memory"


def _damage_copies(cluster: RunningCluster, draw: random.Random) -> str:
    """The copies that peers hold of a host's newest step are damaged; then it is gone, so that they are wanted."""
    host, _ = cluster.worker(draw.randrange(cluster.members()))
    holders = [cluster.worker(rank)[0] for rank in range(cluster.members())]
    copies = [path for holder in holders if holder != host for path in _copies(cluster, host, holder)]
    if not copies:
        raise NotYet(f"no peer holds a copy of the memory of {host}")
    # No more copies come, or the damaged one would be written anew before anyone reads it.
    os.kill(cluster.agent(host), signal.SIGSTOP)
    newest = max(copy.stat().st_mtime_ns for copy in copies)
    damaged = [copy for copy in copies if copy.stat().st_mtime_ns == newest]
    try:
        for copy in damaged:
            flip(copy, draw)
    finally:
        cluster.kill_host(host)
    return (
        f"a flipped bit in the newest copy of {host} at {damaged[0].parents[2].name}, and {host} gone with its memory"
    )


def _copies(cluster: RunningCluster, owner: str, holder: str) -> list[Path]:
    """The copies of the memory slots of `owner` that `holder` has."""
    found = (cluster.memory(holder) / COPIES / owner).glob("gen-*")
    return [copy for copy in found if copy.stat().st_size > HEADER_BYTES]


def _lose_slice(cluster: RunningCluster, draw: random.Random) -> str:
    names = [cluster.worker(rank)[0] for rank in range(cluster.members())]
    slices = {event["host"]: event["slice"] for event in cluster.events("agent_started")}
    # A spare is in no slice, also while it stands in for a lost host of one.
    lost = draw.choice(sorted({slices[name] for name in names if slices[name] >= 0} or {SPARE}))
    hosts = [name for name in names if slices[name] == lost]
    for host in hosts:
        cluster.kill_host(host)
    return f"slice {lost} ({' and '.join(hosts)}) gone with its memory"


def _damage_slots(damage: Callable[[Path, random.Random], None], what: str) -> Hurt:
    """Sealed slots of a host are damaged; then its worker dies, so that they are wanted."""

    def hurt(cluster: RunningCluster, draw: random.Random) -> str:
        host, pid = cluster.worker(draw.randrange(cluster.members()))
        os.kill(pid, signal.SIGSTOP)  # or the slot would be written anew
        try:
            for slot in sorted((cluster.memory(host) / "own").glob("gen-*")):
                if slot.stat().st_size > HEADER_BYTES:  # else it was damaged before, and never written since
                    damage(slot, draw)
        finally:
            os.kill(pid, signal.SIGKILL)
        return f"{what} each memory slot of {host}, and SIGKILL to its worker"

    return hurt


def truncate(slot: Path, draw: random.Random) -> None:
    """Cuts a slot off, somewhere: in its header, in its data, or at its very beginning."""
    os.truncate(slot, draw.choice((0, draw.randrange(HEADER_BYTES), draw.randrange(slot.stat().st_size))))


def flip(slot: Path, draw: random.Random) -> None:
    """Flips one bit of a slot's data, somewhere behind the header."""
    with open(slot, "r+b") as file:
        at = draw.randrange(HEADER_BYTES, min(slot.stat().st_size, 200_000))
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def _preempt(cluster: RunningCluster, draw: random.Random) -> str:
    """SIGTERM to one process of a host, which means the whole host whatever process it is."""
    host, worker = cluster.worker(draw.randrange(cluster.members()))
    who = draw.choice(("agent", "zygote", "worker"))
    pid = {"agent": cluster.agent, "zygote": cluster.zygote}.get(who, lambda _: worker)(host)
    if not listens(pid, signal.SIGTERM):
        raise NotYet(f"the {who} of {host} (pid {pid}) has just begun: SIGTERM would kill it and tell nobody")
    os.kill(pid, signal.SIGTERM)
    return f"SIGTERM to the {who} of {host}"


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for this signal; without one SIGTERM ends it at once."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


RECOVERABLE, ANY = ("recoverable",), ("recoverable", "transient")

KINDS: Mapping[str, FaultKind] = types.MappingProxyType(
    {
        "kill": FaultKind(_signal_worker(signal.SIGKILL), True, RECOVERABLE, "a worker is killed"),
        "crash": FaultKind(_signal_worker(signal.SIGSEGV), True, RECOVERABLE, "a worker crashes"),
        "hang": FaultKind(_signal_worker(signal.SIGSTOP), True, RECOVERABLE, "a worker stops, and lives", "stacks"),
        "two": FaultKind(_kill_two, True, RECOVERABLE, "two workers are killed in the same moment"),
        # Where the damaged slot was the only one of its step, a second attempt takes an older step.
        "flip": FaultKind(_damage_slots(flip, "a flipped bit in"), True, ANY, "bits flip in memory; a worker dies"),
        "truncate": FaultKind(_damage_slots(truncate, "cut off:"), True, ANY, "memory slots end early; a worker dies"),
        "service": FaultKind(_kill_service, True, RECOVERABLE, "JAX's coordination service dies"),
        "host": FaultKind(_lose_host, True, ANY, "a host is gone with its memory"),
        "slice": FaultKind(_lose_slice, True, ANY, "all hosts of a slice are gone with their memory"),
        "partners": FaultKind(
            _lose_partners, True, ANY, "a host and the holder of its copies are gone, with their memory"
        ),
        "copies": FaultKind(_damage_copies, True, ANY, "bits flip in the copies of a host; it is gone with its memory"),
        "cut": FaultKind(_cut_off(False), True, ANY, "a host is silent until it is given up, then it is back"),
        "pause": FaultKind(_cut_off(True), True, ANY, "a host stands still until it is given up, then it goes on"),
        "again": FaultKind(_kill_again, True, ANY, "a worker is killed, and another one while training recovers"),
        "zygote": FaultKind(_kill_zygote, False, (), "a zygote dies"),
        "agent": FaultKind(_kill_agent, False, (), "an agent dies, its worker lives"),
        "coordinator": FaultKind(_kill_coordinator, False, (), "the coordinator dies"),
        "preempt": FaultKind(_preempt, True, (), "a host is told to end, ends, and comes back", leaves=True),
    }
)
