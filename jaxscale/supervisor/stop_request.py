"""A person's wish that the run stops, kept until a coordinator has taken it.

While the run starts, or its coordinator is being started again, nobody listens; a wish that was told only once would be
lost and the run would train to its end. A second signal, or a minute without an answer, means: end everything now.
Read next: `launch.py`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

AGAIN_SECONDS = 0.5
"""Between two attempts."""
ANSWER_SECONDS = 60.0
ONE_SECONDS = 0.5
"""Signals that come so close together are one: a shell and a wrapper may each pass the same Ctrl-C on."""


class StopRequest:
    """`signalled` is a signal handler; the rest is called from the loop that watches."""

    def __init__(self, ask: Callable[[str], bool], clock: Callable[[], float] = time.monotonic) -> None:
        """`ask`: tells the coordinator that this signal asks for a stop; whether it has taken it."""
        self._ask, self._clock = ask, clock
        self.reason = ""
        """The signal's name; empty while nobody asked."""
        self._again = ""
        self._is_taken = False
        self._first = self._since = self._tried = 0.0

    def signalled(self, number: int, _frame: object = None) -> None:
        """The first one asks for a stop, another one for an end at once."""
        now = self._clock()
        if not self.reason:
            self._first = self._since = now
            self._tried = now - AGAIN_SECONDS
            self.reason = signal.Signals(number).name
        elif now - self._first >= ONE_SECONDS:
            self._again = signal.Signals(number).name

    def poll(self) -> None:
        """Asks, where that is due."""
        if self.reason and not self._is_taken and self._clock() - self._tried >= AGAIN_SECONDS:
            self._is_taken = self._ask(self.reason)
            self._tried = self._clock()

    def forget_answer(self) -> None:
        """The coordinator that may have taken it is gone, perhaps before it was decided: the next one is asked."""
        if self._is_taken:
            self._is_taken, self._since = False, self._clock()

    @property
    def impatience(self) -> str:
        """Why everything is to end now, whatever is lost; empty: it is not."""
        if self._again:
            return f"a second signal, {self._again}"
        if self.reason and not self._is_taken and self._clock() - self._since > ANSWER_SECONDS:
            return f"{self.reason}, and no coordinator answered for {ANSWER_SECONDS:g} s"
        return ""
