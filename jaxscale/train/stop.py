"""How a run is asked to stop: a signal sets a flag, and all processes of a world answer it at the same step.

Read next: `loop.py`, which looks at it in every section.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from jaxscale.world import Agreement

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM and SIGINT; a second signal ends the process at once, and so does the first in `ends_at_once`."""

    def __init__(self) -> None:
        self.reason = ""
        self._nothing_begun = ""
        self._ending = threading.Lock()

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.reason:
            os._exit(128 + number)
        self._end_if_nothing_begun(number)
        self.reason = signal.Signals(number).name

    @contextlib.contextmanager
    def ends_at_once(self, when: str) -> Iterator[None]:
        """Nothing has been written yet, so there is nothing to save: a signal ends the process. `when`: for people."""
        self._nothing_begun = when
        try:
            yield
        finally:
            self._nothing_begun = ""

    def listen(self, received: socket.socket) -> None:
        """Does what `__call__` would, while the main thread waits in native code, where Python's handlers do not run.

        received: gets a byte for each signal, and an empty end. Returns at the end.
        """
        count = 0
        while data := received.recv(1):
            if data[0] not in NUMBERS:
                continue
            count += 1
            if count > 1:
                os._exit(128 + data[0])
            self._end_if_nothing_begun(data[0])

    def _end_if_nothing_begun(self, number: int) -> None:
        if self._nothing_begun:
            self._ending.acquire()  # for good: the other thread, with the same signal, waits here for the end
            name = signal.Signals(number).name
            sys.stderr.write(f"error: {name} came while {self._nothing_begun}; nothing was trained or written\n")
            sys.stderr.flush()
            os._exit(128 + number)


class StopAsked(BaseException):
    """Ends an evaluation or a sample in the middle.

    No Exception: a recipe's own `except Exception` must not take it for a failure.
    """


class AgreedStop:
    """`StopRequest` of a world: all processes say yes at the same call, so that none waits for another in a step."""

    def __init__(self, flag: StopFlag, agreement: Agreement) -> None:
        self._flag, self._agreement = flag, agreement
        self._agreed = ""

    def requested(self) -> str:
        if not self._agreed and self._agreement.any_asks(bool(self._flag.reason)):
            self._agreed = self._flag.reason or "another process was asked to stop"
        return self._agreed


@contextlib.contextmanager
def signals() -> Iterator[StopFlag]:
    """Catches SIGTERM and SIGINT while training; outside the main thread Python cannot, and the caller has its own."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    received, sent = socket.socketpair()
    sent.setblocking(False)
    listener = threading.Thread(target=flag.listen, args=(received,), name="signals", daemon=True)
    listener.start()
    wakes = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, flag) for number in NUMBERS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakes)
        sent.close()
        listener.join()
        received.close()
