"""What a worker and its agent tell each other without a message: two small records in shared memory.

The worker's record says which section it is in since when, and how long its sections took; a look at it costs nothing
and works on a worker that hangs. The agent's record says which step is committed and when the next
ones are due. Each has one writer and is a seqlock:
the writer makes the counter odd, writes, makes it even; a reader that saw it change looks again. Read next:
`limits.py`, which judges the sections, and `agent.py`.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxscale.train.protocols import Section

PROGRESS, VERDICTS, MAILBOX, STACKS = "progress", "verdicts", "agent.sock", "stacks"
"""Names in a host's shared-memory folder: the two records, the agent's mailbox, and where a worker dumps its stacks."""

MAILBOX_VARIABLE = "JAXSCALE_MAILBOX"
"""Environment variable with the mailbox's path, for a zygote and what it forks."""

SECTIONS: tuple[Section, ...] = ("restore", "compile", "data", "step", "evaluate", "save", "finish")
HISTORY = 64
"""Durations kept per section."""

_SEQUENCE = struct.Struct("=Q")
_HEAD = struct.Struct("=QQqIIq")  # epoch, pid, step, section, finished, entered
_ENDED = struct.Struct("=Id")  # sections of this kind ended so far, padding by the double
_DURATION = struct.Struct("=f")
_DECIDED = struct.Struct("=qqqqqq")
_SECTION_BYTES = 16 + HISTORY * _DURATION.size
PROGRESS_BYTES = 4096
VERDICT_BYTES = 64
RETRIES = 1000


class TornRecord(RuntimeError):
    """A record whose writer died in the middle of a change, or that is no record."""


@dataclass(frozen=True)
class Progress:
    """Where a worker stands. Times are seconds of `time.monotonic`, which all processes of a host share."""

    epoch: int
    pid: int
    step: int
    """Updates done when the section was entered."""
    section: Section
    entered: float
    finished: bool
    ended: dict[str, int]
    """Sections of each kind that have ended in this epoch."""
    durations: dict[str, tuple[float, ...]]
    """Seconds of the last sections of each kind, oldest first; at most HISTORY."""


@dataclass(frozen=True)
class Verdicts:
    """What the coordinator decided of memory checkpoints."""

    committed: int
    """The newest step that every index range of has its copies; -1 = none."""
    decided: int
    """Every snapshot up to this step is committed or dropped: its slot may be written again; -1 = none."""
    since: int = -1
    """From this step on a checkpoint is due every `every` steps."""
    every: int = 0
    """0 = nothing was decided about it: the worker goes on as it does (`cadence.py`)."""
    keep: int = -1
    """The step whose slots are being made durable: they are not written over; -1 = none."""
    plain: int = -1
    """From this step on workers save into the durable tier themselves, since a host has no memory tier; -1 = not."""


class _Record:
    """A seqlock over a shared file. One process writes, others read."""

    def __init__(self, path: Path, size: int, *, create: bool) -> None:
        flags = os.O_RDWR | (os.O_CREAT if create else 0) | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(file, size)
            elif os.fstat(file).st_size != size:
                raise TornRecord(f"{path} has {os.fstat(file).st_size} bytes, a record has {size}")
            self._map = mmap.mmap(file, size)
        finally:
            os.close(file)

    def write(self, change: Callable[[mmap.mmap], None]) -> None:
        (sequence,) = _SEQUENCE.unpack_from(self._map, 0)
        sequence |= 1  # a writer that died here left it odd
        _SEQUENCE.pack_into(self._map, 0, sequence)
        try:
            change(self._map)
        finally:  # a value that cannot be packed must not make the record unreadable
            _SEQUENCE.pack_into(self._map, 0, sequence + 1)

    def read(self) -> bytes:
        for _ in range(RETRIES):
            before = self._map[: _SEQUENCE.size]
            data = self._map[:]
            if before == self._map[: _SEQUENCE.size] and not before[0] & 1:
                return data
            time.sleep(0)
        raise TornRecord("the record changed or was being written at every look; its writer may have died")

    def close(self) -> None:
        self._map.close()


class ProgressRecord:
    """The worker's side is `enter` and `finish`; the agent's is `read`."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._record = _Record(path, PROGRESS_BYTES, create=create)
        self._section = -1
        self._entered = 0.0
        self._ended = [0] * len(SECTIONS)

    def begin(self, epoch: int, pid: int, step: int = 0) -> None:
        """A new worker: its history starts afresh. It is in `restore`."""
        self._section, self._entered = SECTIONS.index("restore"), time.monotonic()
        self._ended = [0] * len(SECTIONS)

        def change(data: mmap.mmap) -> None:
            data[_SEQUENCE.size :] = bytes(PROGRESS_BYTES - _SEQUENCE.size)
            self._head(data, epoch, pid, step, finished=0)

        self._record.write(change)
        self._epoch, self._pid, self._step = epoch, pid, step

    def enter(self, section: Section, step: int) -> None:
        """The worker enters a section after `step` updates. The time in the one before goes into its history."""
        now = time.monotonic()
        before, seconds = self._section, now - self._entered
        self._section, self._entered, self._step = SECTIONS.index(section), now, step

        def change(data: mmap.mmap) -> None:
            offset = _history(before)
            self._ended[before] += 1
            _ENDED.pack_into(data, offset, self._ended[before], 0.0)
            slot = (self._ended[before] - 1) % HISTORY
            _DURATION.pack_into(data, offset + 16 + slot * _DURATION.size, seconds)
            self._head(data, self._epoch, self._pid, step, finished=0)

        self._record.write(change)

    def finish(self) -> None:
        """The worker has done all it had to and is about to exit: silence is no hang any more."""
        self._record.write(lambda data: self._head(data, self._epoch, self._pid, self._step, finished=1))

    def read(self) -> Progress:
        """Raises TornRecord."""
        data = self._record.read()
        epoch, pid, step, section, finished, entered = _HEAD.unpack_from(data, _SEQUENCE.size)
        if section >= len(SECTIONS):
            raise TornRecord(f"section {section} of {len(SECTIONS)}: this is no progress record")
        ended: dict[str, int] = {}
        durations: dict[str, tuple[float, ...]] = {}
        for index, name in enumerate(SECTIONS):
            count = _ENDED.unpack_from(data, _history(index))[0]
            kept = min(count, HISTORY)
            order = [(count - kept + i) % HISTORY for i in range(kept)]
            values = struct.unpack_from(f"={HISTORY}f", data, _history(index) + 16)
            ended[name], durations[name] = count, tuple(values[i] for i in order)
        return Progress(epoch, pid, step, SECTIONS[section], entered / 1e9, bool(finished), ended, durations)

    def close(self) -> None:
        self._record.close()

    def _head(self, data: mmap.mmap, epoch: int, pid: int, step: int, finished: int) -> None:
        _HEAD.pack_into(data, _SEQUENCE.size, epoch, pid, step, self._section, finished, round(self._entered * 1e9))


class VerdictRecord:
    """The agent writes, the worker reads before each snapshot."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._record = _Record(path, VERDICT_BYTES, create=create)

    def write(self, verdicts: Verdicts) -> None:
        fields = dataclasses.astuple(verdicts)
        self._record.write(lambda data: _DECIDED.pack_into(data, _SEQUENCE.size, *fields))

    def read(self) -> Verdicts:
        """Raises TornRecord."""
        return Verdicts(*_DECIDED.unpack_from(self._record.read(), _SEQUENCE.size))

    def close(self) -> None:
        self._record.close()


def _history(section: int) -> int:
    return _SEQUENCE.size + _HEAD.size + section * _SECTION_BYTES
