"""metrics.jsonl: one line per step, written by one process, never torn for a reader, whole after any kill.

Every line goes to the operating system at once (a killed process loses nothing); `commit` waits for the disk, and is
called where a checkpoint comes to exist. Read next: `sinks.py`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscale.track import lines

BLOCK = 1 << 16


class CannotWrite(OSError):
    """A file of the run directory cannot be written; says which, why, and how much room is left."""


class Appender:
    """Appends whole lines to a file. First ends a torn last line. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._torn = _is_torn(self._file)

    def append(self, line: bytes) -> None:
        """Adds a line, given with its line end, in one write. Raises CannotWrite; then nothing of the line stays."""
        with self._lock:
            before = os.fstat(self._file).st_size
            data = b"\n" + line if self._torn else line
            try:
                written = os.write(self._file, data)
                if written != len(data):  # the disk became full in the middle; this write says why
                    os.write(self._file, data[written:])
            except OSError as error:
                _cut(self._file, before)
                raise _cannot_write(self.path, error) from error
            self._torn = False

    def commit(self) -> None:
        """Returns when every line so far is on the disk. Raises CannotWrite."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        os.close(self._file)


class JsonlMetrics:
    """The `MetricsSink` of the run directory: `write` a line per step, `commit` before a checkpoint exists."""

    def __init__(self, path: Path) -> None:
        """Opens the file, makes it if need be, and ends a torn last line. Raises OSError."""
        self.path = path
        self._appender = Appender(path)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line. Raises CannotWrite (full disk), TypeError for a value that JSON cannot hold."""
        self._appender.append(lines.encode(line))

    def commit(self) -> None:
        """Waits until all lines are on the disk. May be called from another thread."""
        self._appender.commit()

    def ensure_line(self, line: Mapping[str, Any]) -> bool:
        """Writes the line of a restored state if the file lost it, and says whether it did. An empty line is no line.

        Looks backwards for the first line that is not of a later step: earlier incarnations may have gone further.
        """
        if not line:
            return False
        for found in backwards(self.path):
            step = found.get("step")
            if isinstance(step, int) and step <= line["step"]:
                if step == line["step"]:
                    return False
                break
        self.write(line)
        return True

    def close(self) -> None:
        self._appender.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl by growing step; of several for one step, that of the highest epoch (the last one).

    What is not a whole line with an integer `step` is passed over: a killed writer may leave a torn one. A file that is
    not there has no lines.
    """
    best: dict[int, dict[str, Any]] = {}
    try:
        file = open(path, "rb")  # noqa: SIM115 -- the with statement below would also catch errors of reading
    except FileNotFoundError:
        return []
    with file:
        for text in file:
            line = _parse(text)
            if line is None or type(line.get("step")) is not int:
                continue
            kept = best.get(line["step"])
            if kept is None or _epoch(line) >= _epoch(kept):
                best[line["step"]] = line
    return [best[step] for step in sorted(best)]


def backwards(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The readable lines of a file from the last to the first, within its last `limit` bytes (None: all of it)."""
    try:
        file = open(path, "rb")  # noqa: SIM115 -- as in read_metrics
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        floor = 0 if limit is None else max(0, position - limit)
        rest = b""
        while position > floor:
            size = min(BLOCK, position - floor)
            position -= size
            file.seek(position)
            first, *whole = (file.read(size) + rest).split(b"\n")
            for text in reversed(whole):
                if (line := _parse(text)) is not None:
                    yield line
            rest = first
        if floor == 0 and (line := _parse(rest)) is not None:
            yield line


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        return lines.decode(text)
    except (ValueError, RecursionError):
        return None


def _epoch(line: Mapping[str, Any]) -> int:
    epoch = line.get("epoch")
    return epoch if isinstance(epoch, int) else 0


def _is_torn(file: int) -> bool:
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def _cut(file: int, size: int) -> None:
    try:
        os.ftruncate(file, size)
    except OSError:
        return  # the error that led here is the one to report; a torn line is ended by the next writer


def _cannot_write(path: Path, error: OSError) -> CannotWrite:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CannotWrite(
            error.errno, f"cannot write {path}: the disk is full; make room, the same command then goes on"
        )
    return CannotWrite(
        error.errno, f"cannot write {path}: {os.strerror(error.errno or 0)}; repair the disk, then start again"
    )
