"""New lines of a run's events.jsonl and metrics.jsonl, in the order of their times, while others write them.

Takes no lock, imports no JAX, and may be pointed at a run that is over. Read next: `story.py`, which makes sense of the
lines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxscale.track import lines

EVENTS, METRICS = "events.jsonl", "metrics.jsonl"
Told = tuple[Literal["event", "metrics"], dict[str, Any]]
"""Which file a line is from, and the line."""


class Tail:
    """The whole lines of one file that were added since the last look."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """`offset`: bytes to pass over, the end of a line."""
        self._path, self._offset = path, offset
        self.damaged = 0
        """Lines passed over so far."""

    def new(self) -> list[dict[str, Any]]:
        """A line that is still being written comes at a later look; one that is no JSON object is passed over."""
        try:
            size = os.stat(self._path).st_size
        except FileNotFoundError:
            return []
        if size < self._offset:  # another file took its place
            self._offset = 0
        if size == self._offset:
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read(size - self._offset)
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        parsed = [_parse(text) for text in whole.splitlines()]
        found = [line for line in parsed if line is not None]
        self.damaged += len(parsed) - len(found)
        return found


class Follower:
    """Both files of a run directory."""

    def __init__(self, run: Path, offsets: Mapping[str, int] | None = None) -> None:
        """`offsets`: bytes to pass over in each file, by its name; none: everything is read."""
        offsets = offsets or {}
        self._events = Tail(run / EVENTS, offsets.get(EVENTS, 0))
        self._metrics = Tail(run / METRICS, offsets.get(METRICS, 0))

    @property
    def damaged(self) -> dict[str, int]:
        """Lines that were passed over, by the file they stand in."""
        counts = {EVENTS: self._events.damaged, METRICS: self._metrics.damaged}
        return {name: count for name, count in counts.items() if count}

    def new(self) -> list[Told]:
        """What was added since the last look, the earliest first."""
        told: list[Told] = [("event", line) for line in self._events.new()]
        told += [("metrics", line) for line in self._metrics.new() if isinstance(line.get("step"), int)]
        return sorted(told, key=lambda one: time_of(one[1]))


def offsets_of(run: Path) -> dict[str, int]:
    """How long the files are now, for a follower of what comes from now on."""
    return {name: _size(run / name) for name in (EVENTS, METRICS)}


def tail_offset(path: Path, most: int) -> int:
    """Where the last `most` bytes of a file begin, moved to the start of a line; 0 where there is no file."""
    start = _size(path) - most
    if start <= 0:
        return 0
    with open(path, "rb") as file:
        file.seek(start)
        return start + len(file.readline())


def time_of(line: Mapping[str, Any]) -> float:
    """Seconds since 1970; 0 for a line that does not say."""
    time = line.get("time")
    return float(time) if isinstance(time, int | float) else 0.0


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        return lines.decode(text)
    except (ValueError, RecursionError):
        return None
