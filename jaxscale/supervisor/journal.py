"""The coordinator's lines of events.jsonl, on a disk that may be full: what cannot be written now is written later.

A run does not end because nobody can write down what happens to it. Lines that wait keep the time at which they were
said, and their order. Read next: `coordinator.py`.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from typing import Any

from jaxscale.run_directory import RunDirectory

AGAIN_SECONDS = 1.0
"""After which a write that failed is tried again."""
WAITING_LINES = 2000
"""How many lines may wait; of more than these the oldest are lost."""

logger = logging.getLogger(__name__)


class Journal:
    """Writes events as the coordinator. Never raises OSError."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._waiting: deque[tuple[str, dict[str, Any]]] = deque()
        self._tried = self._since = 0.0
        self._lost = 0
        self._posted: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()

    def post(self, kind: str, **fields: Any) -> None:
        """As `event`, from any other thread; it is written with the next `retry`."""
        self._posted.put((kind, fields))

    def event(self, kind: str, **fields: Any) -> None:
        """Appends a line, or keeps it until it can be appended."""
        if not self._waiting:
            try:
                self._directory.event(kind, source="coordinator", **fields)
                return
            except OSError as error:
                self._tried = self._since = time.monotonic()
                logger.warning("%s; the run goes on, and what happens is written down when it can be", error)
        # A line is not given its time when it is written, but when it was said.
        said = {"time": time.time(), "mono": time.monotonic(), "epoch": self._directory.epoch}
        self._waiting.append((kind, said | fields))
        if len(self._waiting) > WAITING_LINES:
            self._waiting.popleft()
            self._lost += 1

    def retry(self, *, at_once: bool = False) -> None:
        """Writes what was posted and what waits, where it is time to try again."""
        now = time.monotonic()
        while not self._posted.empty():
            kind, fields = self._posted.get_nowait()
            self.event(kind, **fields)
        if not self._waiting or (now - self._tried < AGAIN_SECONDS and not at_once):
            return
        self._tried = now
        count = len(self._waiting)
        while self._waiting:
            kind, fields = self._waiting[0]
            try:
                self._directory.event(kind, source="coordinator", **fields)
            except OSError:
                return
            self._waiting.popleft()
        lost = f", and {self._lost} older ones were lost" if self._lost else ""
        took = now - self._since
        logger.warning("events can be written again after %.0f s; the last %d were written late%s", took, count, lost)
        self._lost = 0
