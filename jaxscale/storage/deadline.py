"""A bound in time for calls that have none: a hung mount can be neither interrupted nor asked, only not waited for.

Each call runs in a thread of its own. One that is late is given up and its thread left behind, as a daemon that no exit
waits for. A few threads that hang are enough: after that nothing more is tried until one of them comes back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

HANGING = 4
"""Threads of one place that may hang at once."""


class LateAnswer(TimeoutError):
    """A call took longer than it may. What it was to do may still happen."""


class Deadline:
    """Of the calls to one place. Safe to use from threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._hanging = 0

    def call[T](self, function: Callable[[], T], seconds: float) -> T:
        """`function()`, or LateAnswer after so many seconds. Raises what the function raises."""
        with self._lock:
            if self._hanging >= HANGING:
                raise LateAnswer(f"{self._name} does not answer: {self._hanging} calls to it hang already")
        result: dict[str, Any] = {}
        ended = threading.Event()

        def run() -> None:
            try:
                result["value"] = function()
            except BaseException as error:  # raised where it was asked for
                result["error"] = error
            with self._lock:
                ended.set()
                self._hanging -= "late" in result

        threading.Thread(target=run, name=f"store {self._name}", daemon=True).start()
        if not ended.wait(seconds):
            with self._lock:
                if not ended.is_set():
                    result["late"] = True
                    self._hanging += 1
                    raise LateAnswer(f"{self._name} has not answered for {seconds:g} s")
        if "error" in result:
            raise result["error"]
        value: T = result["value"]
        return value
