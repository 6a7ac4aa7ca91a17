"""Where the wall time of a supervised run went, from what it wrote about itself: metrics.jsonl and events.jsonl.

Nothing is filled in: time that no line and no state explains is `unaccounted`, so a log with a hole shows. A pure
function of both files. Read next: `run.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DETECTION_SECONDS = 10.0
"""How long RUNNING may go on without a step before nobody can say what the run was doing."""

Span = tuple[float, float]


@dataclass(frozen=True)
class Ledger:
    """Seconds of a run, by what they were for; the four parts sum to `wall`."""

    wall: float
    """From the first event to the last."""
    trained: float
    """Steps of the committed history."""
    replayed: float
    """Steps whose work was lost, and trained again in a later epoch."""
    standing: float
    """Start, detection, fencing, forming, restoring, the first step of an epoch, saves and evaluations, draining."""
    unaccounted: float
    effective: float
    """Of the time from the first line to the last, the share in which the committed history grew."""

    @property
    def accounted(self) -> float:
        """Share of the wall time that is explained."""
        return 1 - self.unaccounted / self.wall


def account(
    events: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], committed: Iterable[Mapping[str, Any]]
) -> Ledger:
    """Sorts the time of a run.

    events, lines: both files, whole, in the order of the file. committed: of each step the line that counts
    (`read_metrics`). Raises ValueError where there is no event or no line.
    """
    if not events or not lines:
        raise ValueError(f"a ledger needs events and metrics lines, and there are {len(events)} and {len(lines)}")
    counts = {(line["step"], line["epoch"]) for line in committed}
    steps = list(_steps(lines))
    trained = [span for line, span in steps if (line["step"], line["epoch"]) in counts]
    replayed = [span for line, span in steps if (line["step"], line["epoch"]) not in counts]
    begin, end = min(e["time"] for e in events), max(e["time"] for e in events)
    whole, standing = (begin, end), [*_standing(events, lines, begin, end), *_pauses(lines)]
    in_trained = measure(trained, whole)
    in_steps = measure([*trained, *replayed], whole)
    in_all = measure([*trained, *replayed, *standing], whole)
    first, last = min(line["time"] for line in lines), max(line["time"] for line in lines)
    return Ledger(
        wall=end - begin,
        trained=in_trained,
        replayed=in_steps - in_trained,
        standing=in_all - in_steps,
        unaccounted=end - begin - in_all,
        effective=measure(trained, (first, last)) / (last - first) if last > first else 1.0,
    )


def _steps(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Span]]:
    """When each step was under way, by its own clock. The first step of an epoch is counted as standing: programs are
    loaded in it.
    """
    for before, line in itertools.pairwise(lines):
        if before["epoch"] == line["epoch"]:
            yield line, (line["time"] - line["step_seconds"], line["time"])


def _pauses(lines: Sequence[Mapping[str, Any]]) -> Iterator[Span]:
    """What a worker did before a step, as it says: saves, evaluations, compilations."""
    for line in lines:
        end = line["time"] - line["step_seconds"]
        yield end - line["pause_seconds"], end


def _standing(
    events: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], begin: float, end: float
) -> Iterator[Span]:
    """Every state but RUNNING, and of RUNNING the time from the last step of its epoch to the news of a fault."""
    state, since = "WAITING", begin
    for event in (*(e for e in events if e["kind"] == "state"), {"to": "", "time": end}):
        if state != "RUNNING":
            yield since, event["time"]
        else:
            last = max((line["time"] for line in lines if line["time"] <= event["time"]), default=since)
            if event["time"] - last <= DETECTION_SECONDS:
                yield last, event["time"]
        state, since = event["to"], event["time"]


def measure(spans: Iterable[Span], within: Span) -> float:
    """Length of the union of spans, inside one span."""
    total, reached = 0.0, within[0]
    for begin, end in sorted(spans):
        begin, end = max(begin, reached), min(end, within[1])
        if end > begin:
            total += end - begin
            reached = end
    return total
