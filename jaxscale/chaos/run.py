"""A run under chaos, and what must be true of it afterwards: it ended well, and trained what an undisturbed run trains.

Both runs are real: `jaxscale launch`, real processes, real signals. Read next: `faults.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxscale.chaos.faults import KINDS, FaultKind, NotYet
from jaxscale.chaos.ledger import Ledger, account
from jaxscale.chaos.resources import Held, crowded, held, leaked
from jaxscale.chaos.schedule import Strike
from jaxscale.testing.cluster import RunningCluster, launched, left_behind
from jaxscale.track.jsonl import read_metrics
from jaxscale.track.lines import decode, encode

RECOVERY_SECONDS = 120.0
ACCOUNTED = 0.995
"""Share of the wall time that a run's own logs must explain."""
NEAR_STEPS = DOUBLING_STEPS = 50
"""Sums in another order differ in their last bits, and training doubles such a difference every so many steps
(docs/decisions.md): the tolerance holds so long after the first resize, and from there on doubles as well."""
SETTLE_STEPS = 3
"""Steps of the first epoch before the first fault, and after a fault that must not be noticed."""
LEAK_SECONDS = 5.0
"""How long what looks like a leak may take to go away."""
REFERENCE_RUN, REFERENCE_DONE = "run", "done.json"
"""In the folder of a reference: the run directory, and what it was made with, written when it is whole."""


class WrongReference(ValueError):
    """A folder holds another run than the one that is wanted, or something else."""


@dataclass(frozen=True)
class Recovery:
    """One fault, and what followed."""

    kind: str
    whom: str
    step: int
    seconds: float
    """From the fault to the first line of a later epoch with a new step; 0 where no epoch had to follow."""
    replayed: int
    """Steps that were trained again."""


@dataclass
class Report:
    """What a run under chaos showed. `problems` is empty where all is well."""

    seed: int
    recoveries: list[Recovery] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    largest_difference: float = 0.0
    """Of a loss to the undisturbed run's, relative."""
    resized: bool = False
    ledger: Ledger | None = None
    """None where the run wrote nothing."""

    @property
    def passed(self) -> bool:
        return not self.problems


def undisturbed(
    recipe: Path, folder: Path, overrides: Sequence[object], tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Lines of metrics of `recipe` trained with `overrides` and left in peace.

    The run in `folder` is used where there is a whole one; one that was interrupted is made anew. Raises WrongReference
    where the folder holds the run of another recipe or of other overrides.
    """
    wanted = {"recipe": recipe.read_text(), "overrides": [str(override) for override in overrides]}
    run, done = folder / REFERENCE_RUN, folder / REFERENCE_DONE
    if done.exists():
        found = decode(done.read_bytes())
        if found != wanted:
            what = "overrides" if found["overrides"] != wanted["overrides"] else "recipe"
            raise WrongReference(
                f"{folder} holds an undisturbed run of another {what} ({' '.join(found['overrides'])}), so its losses "
                f"say nothing about this one ({' '.join(wanted['overrides'])}); name another folder, or remove this one"
            )
        tell(f"compared with the undisturbed run in {folder}")
        return read_metrics(run / "metrics.jsonl")
    if folder.exists() and any(entry.name not in (REFERENCE_RUN, f"{REFERENCE_RUN}.out") for entry in folder.iterdir()):
        raise WrongReference(f"{folder} has files that are no undisturbed run; name a folder that is empty or new")
    shutil.rmtree(run, ignore_errors=True)  # of one that was interrupted
    tell(f"an undisturbed run: {' '.join(wanted['overrides'])}")
    with launched(recipe, run, *overrides) as cluster:
        if (code := cluster.finish(3600)) != 0:
            raise RuntimeError(f"the undisturbed run ended with exit code {code}:\n{cluster.output[-2000:]}")
        lines = cluster.metrics()
    done.write_bytes(encode(wanted))
    return lines


def run_chaos(
    recipe: Path,
    folder: Path,
    seed: int,
    strikes: Sequence[Strike],
    reference: Sequence[dict[str, Any]],
    overrides: Sequence[object],
    tolerance: float,
    tell: Callable[[str], None],
) -> Report:
    """Strikes a run of `recipe` and judges it.

    reference: metrics lines of the undisturbed run with the same overrides, whose losses must come out again: bit for
    bit while the world keeps its size, within `tolerance` (relative) for NEAR_STEPS after the first resize.
    """
    report = Report(seed)
    with launched(recipe, folder, *overrides) as cluster:
        memory: Path | None = None
        try:
            cluster.wait_for_step(SETTLE_STEPS, seconds=RECOVERY_SECONDS)
            memory = cluster.memory(cluster.worker(0)[0]).parent
            before = held(cluster)
            for strike in strikes:
                report.recoveries.append(strike_once(cluster, strike))
                last = report.recoveries[-1]
                tell(f"  {last.kind}: {last.whom} at step {last.step}: {_ended(last)}")
            report.problems += _leaks(cluster, before, memory)
            code = cluster.finish(RECOVERY_SECONDS * 10)
            if code != 0:
                report.problems.append(f"exit code {code}: {cluster.output.strip().splitlines()[-1:]}")
        except AssertionError as error:
            report.problems.append(str(error))
        report.resized = bool(cluster.events("resized"))
        report.problems += _wrong(cluster, reference, tolerance, report)
        report.problems += _unexplained(cluster, report)
        if cluster.process.poll() is not None:  # else it could not clean up yet, and the problem is another one
            report.problems += [f"left behind: process {pid}" for pid in left_behind(folder)]
            if memory is not None and memory.exists():
                report.problems.append(f"left behind: {memory}, with {len(list(memory.rglob('*')))} files")
    return report


def _leaks(cluster: RunningCluster, before: Mapping[int, Held], memory: Path) -> list[str]:
    """What the processes hold more than before the first fault, once what is under way has had time to end."""
    found: list[str] = []
    deadline = time.monotonic() + LEAK_SECONDS
    while time.monotonic() < deadline:
        if not (found := [*leaked(before, held(cluster)), *crowded(memory)]):
            break
        time.sleep(0.1)
    return found


def strike_once(cluster: RunningCluster, strike: Strike) -> Recovery:
    """Waits for the strike's moment, does it, and waits for training to go on. Raises AssertionError where it does not
    go on as the kind of fault says.
    """
    kind = KINDS[strike.kind]
    begun = cluster.last_line()
    cluster.wait_for_step(begun["step"] + strike.after_steps, seconds=RECOVERY_SECONDS)
    before, seen, started, whom = _hurt(cluster, kind, strike)
    if not kind.epochs:
        after = cluster.wait_for_step(before["step"] + SETTLE_STEPS, seconds=RECOVERY_SECONDS)
        if after["epoch"] == before["epoch"] or _has_grown(cluster, seen):
            return Recovery(strike.kind, whom, before["step"], 0.0, 0)
        if not came_late(cluster.events()[seen:]):
            raise AssertionError(f"{strike.kind} ({whom}) must not be noticed, but epoch {after['epoch']} followed it")
        return Recovery(strike.kind, f"{whom}, whose next one came late", before["step"], after["time"] - started, 0)

    def further() -> dict[str, Any] | None:
        later = (line for line in cluster.lines() if line["epoch"] > before["epoch"] and line["step"] > before["step"])
        return next(later, None)

    after = cluster.wait_for(further, f"a new step after {strike.kind} ({whom})", RECOVERY_SECONDS)
    replayed = sum(line["epoch"] > before["epoch"] and line["step"] <= before["step"] for line in cluster.lines())
    if kind.leaves:
        _check_leave(cluster, before, seen, f"{strike.kind} ({whom})")
    else:
        classes = [event["class"] for event in cluster.events()[seen:] if event["kind"] == "fault"]
        if not set(classes) <= set(kind.classes) or kind.classes[0] not in classes:
            raise AssertionError(f"{strike.kind} ({whom}) was judged {classes or 'no fault'}, not {kind.classes}")
        if kind.tells and not any(event["kind"] == kind.tells for event in cluster.events()[seen:]):
            raise AssertionError(f"{strike.kind} ({whom}) was followed by no event {kind.tells!r}")
    return Recovery(strike.kind, whom, before["step"], after["time"] - started, replayed)


def _hurt(cluster: RunningCluster, kind: FaultKind, strike: Strike) -> tuple[dict[str, Any], int, float, str]:
    """Does it. Returns the last line of metrics and the number of events before, the time, and who was hurt.

    A world that is just growing, or a host whose agent is just starting again, is let be until it is done: which of the
    two changes an event belongs to could not be told, and a signal to a process that is gone hurts nobody.
    """

    def done() -> tuple[dict[str, Any], int, float, str] | None:
        states = cluster.events("state")
        if not states or states[-1]["to"] != "RUNNING":
            return None
        before, seen, now = cluster.last_line(), len(cluster.events()), time.time()
        with contextlib.suppress(NotYet, ProcessLookupError, FileNotFoundError, StopIteration):
            return before, seen, now, kind.hurt(cluster, random.Random(strike.seed))
        return None

    return cluster.wait_for(done, f"moment in which {strike.kind} could strike", RECOVERY_SECONDS)


def _has_grown(cluster: RunningCluster, seen: int) -> bool:
    """Whether all that happened since is that a host which was lost earlier came back."""
    since = cluster.events()[seen:]
    is_larger = any(e["kind"] == "state" and e["reason"] == "a larger world can be formed" for e in since)
    return is_larger and all(event["kind"] != "fault" for event in since)


def came_late(since: Sequence[dict[str, Any]]) -> bool:
    """Whether all that happened is that a host's next agent needed longer to start than a lease lasts: a slow machine.

    since: events after an agent was killed.
    """
    faults = [event for event in since if event["kind"] == "fault"]
    found = [[e["host"] for e in fault["evidence"] if e["kind"] == "host_lost"] for fault in faults]
    again = [(event["host"], event["time"]) for event in since if event["kind"] == "agent_started"]
    return bool(faults) and all(
        hosts and all(any(host == name and time > fault["time"] for name, time in again) for host in hosts)
        for fault, hosts in zip(faults, found, strict=True)
    )


def _check_leave(cluster: RunningCluster, before: dict[str, Any], seen: int, what: str) -> None:
    """A host was told to end: everybody saved together, no step came twice, and the world goes on without that host.

    Then the host does end, and comes back with a new agent, as a new host. Raises AssertionError.
    """
    events = cluster.events()[seen:]
    if faults := [event["cause"] for event in events if event["kind"] == "fault"]:
        raise AssertionError(f"{what} is no fault, but was judged one: {faults[0]}")
    told = [e["detail"] for e in events if e["kind"] == "alarm" and e["what"] == "preemption"]
    if not told:
        raise AssertionError(f"{what} was followed by another epoch, but no alarm says that a host is to end")
    host = str(told[0]).split()[0]
    if not any(e["kind"] == "state" and (e["from"], e["to"]) == ("DRAINING", "DECIDING") for e in events):
        raise AssertionError(f"{what}: the workers did not all save and end by themselves")
    trained = [
        line["step"] for line in cluster.lines() if line["step"] > before["step"] or line["epoch"] > before["epoch"]
    ]
    if trained != list(range(before["step"] + 1, before["step"] + 1 + len(trained))):
        raise AssertionError(f"{what}: steps were lost or came twice: after step {before['step']} came {trained[:20]}")
    workers = [e for e in cluster.events("worker_started") if e["host"] == host]
    if any(e["epoch"] > before["epoch"] for e in workers):
        raise AssertionError(f"{what}: {host} is to end, but the next world has a worker there")
    if workers and os.path.exists(f"/proc/{workers[-1]['pid']}"):
        raise AssertionError(f"{what}: the worker of {host} (pid {workers[-1]['pid']}) should have ended, but lives")
    agent = cluster.agent(host)
    os.kill(agent, signal.SIGKILL)

    def back() -> bool | None:
        return cluster.agent(host) != agent or None

    cluster.wait_for(back, f"new agent of {host} after {what}", RECOVERY_SECONDS)


def _wrong(
    cluster: RunningCluster, reference: Sequence[dict[str, Any]], tolerance: float, report: Report
) -> Iterator[str]:
    """What of the committed history is not as the undisturbed run's."""
    trained = {line["step"]: line for line in cluster.metrics()}
    expected = {line["step"]: line for line in reference}
    if missing := sorted(expected.keys() - trained.keys()):
        yield f"{len(missing)} steps have no line, the first is {missing[0]}"
    for late in cluster.late_writes():
        yield f"epoch {late['epoch']} wrote step {late['step']} after a later epoch had begun to train"
    resized_at = min((e["time"] for e in cluster.events("resized")), default=float("inf"))
    resized_step = min((step for step, line in trained.items() if line["time"] > resized_at), default=0)
    for step in sorted(expected.keys() & trained.keys()):
        line, right = trained[step], expected[step]
        if (line["row"], line["rows"]) != (right["row"], right["rows"]):
            yield f"step {step} took rows {line['row']} + {line['rows']}, not {right['row']} + {right['rows']}"
            return
        difference = abs(line["loss"] - right["loss"]) / abs(right["loss"])
        report.largest_difference = max(report.largest_difference, difference)
        doublings = min(max(0.0, (step - resized_step - NEAR_STEPS) / DOUBLING_STEPS), 64.0)
        limit = tolerance * 2.0**doublings if line["time"] > resized_at else 0.0
        if difference > limit:
            yield f"the loss of step {step} is {line['loss']!r}, not {right['loss']!r}"
            return


def _unexplained(cluster: RunningCluster, report: Report) -> Iterator[str]:
    """Wall time that the run's own logs do not account for."""
    events, lines = cluster.events(), cluster.lines()
    if events and lines:
        report.ledger = account(events, lines, cluster.metrics())
        if report.ledger.accounted < ACCOUNTED:
            lost, wall, share = report.ledger.unaccounted, report.ledger.wall, report.ledger.accounted
            yield f"{lost:.2f} s of {wall:.1f} s are in no line and no state: {share:.2%} are explained"


def _ended(recovery: Recovery) -> str:
    if not recovery.seconds:
        return "training went on as if nothing had happened"
    return f"back after {recovery.seconds:.2f} s, {recovery.replayed} steps replayed"
