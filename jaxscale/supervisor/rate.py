"""A token bucket: how long to wait so that no more than so many bytes a second are sent. Pure but for its clock.

Copies of memory slots share the network with the gradients; the cap keeps them in the background. One bucket may serve
several pushes at once. Read next: `channel.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_SECONDS = 0.05


class TokenBucket:
    """Lets `bytes_per_second` through on average, and BURST_SECONDS' worth at once. Safe to use from threads."""

    def __init__(self, bytes_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not bytes_per_second > 0:
            raise ValueError(f"a rate of {bytes_per_second} bytes a second lets nothing through; use None for no cap")
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()
        """When all that was taken so far has been let through at the rate."""

    @property
    def burst(self) -> int:
        """Bytes to take at a time."""
        return max(1, int(self._rate * BURST_SECONDS))

    def take(self, nbytes: int) -> float:
        """Books `nbytes` as sent and returns the seconds to wait before more is sent."""
        with self._lock:
            now = self._clock()
            # time in which nothing was sent is not saved up: a burst after a pause would hit the gradients
            self._free_at = max(self._free_at, now) + nbytes / self._rate
            return max(0.0, self._free_at - now - BURST_SECONDS)
