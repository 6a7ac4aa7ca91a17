"""Standard output as something for people: whoever reads it may go away, and what is shown must not steer a terminal.

Read next: `train/display.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from typing import IO, Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and newline; \\x1b begins the sequences that move the cursor, colour, or rename a window."""


def visible(text: str) -> str:
    """The text with control characters spelled out, as `\\x1b`: a model may generate any of them."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def is_live(stream: IO[str]) -> bool:
    """Whether a line on it can be drawn anew: a terminal that knows how (TERM=dumb says that it does not)."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def reader_is_gone(stream: IO[str]) -> bool:
    """Whether nobody can read what is written there any more."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))
    except (OSError, ValueError):  # no file, or closed
        return False


def silence(stream: IO[str]) -> None:
    """Sends to nowhere what is written from now on, and what the stream still holds: Python flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Copy:
    """A stream that fails silently: `| head` ends, a terminal is closed, a disk is full, and the work goes on."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError as error:
                return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
