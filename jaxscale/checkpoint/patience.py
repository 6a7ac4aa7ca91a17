"""Storage that is away for a moment: which failures may pass, and how long they are waited for.

Bounded by a deadline and not by a count: an outage lasts as long as it lasts, however often somebody asks. Read next:
`../retry.py`, whose pauses are used; `durable.py` and `restore.py`, which wait.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

from jaxscale import retry
from jaxscale.checkpoint import agree

STORAGE_SECONDS = 60.0
UNBROKEN = retry.RetryConfig(failures=1_000_000)
"""Without a breaker, which would not look again for 30 s: the deadline alone bounds the attempts."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""No wait makes room."""
PASSING_TEXTS = ("Input/output error", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection reset", "timed out")
"""What libraries make of a passing failure that raise it as another class."""

logger = logging.getLogger(__name__)


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may end otherwise: an error of the storage, and no word on what lies there. Pure."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(one, OSError) and one.errno in FULL for one in seen):
        return False
    return any(retry.is_transient(one) or any(text in str(one) for text in PASSING_TEXTS) for one in seen)


class Patience:
    """Of all processes of a world together, for one thing that is to be read or written."""

    def __init__(self, what: str, seconds: float | None = None) -> None:
        self._what, self._failed = what, 0
        self._until = time.monotonic() + (STORAGE_SECONDS if seconds is None else seconds)

    def waits(self, error: BaseException) -> bool:
        """After a failure: waits and returns True, or False at once where another attempt makes no sense.

        All processes call it with their own errors, and get the same answer.
        """
        self._failed += 1
        if not agree.highest(may_pass(error) and time.monotonic() < self._until):
            return False
        seconds = retry.pause(UNBROKEN, self._failed, 0.0)
        logger.warning("%s failed (%s); it is tried again in %.1f s", self._what, error, seconds)
        time.sleep(seconds)
        return True

    def call[T](self, function: Callable[[], T], failure: type[Exception]) -> T:
        """`function()`, repeated while it raises `failure` for a passing reason. It raises on all processes alike."""
        while True:
            try:
                return function()
            except failure as error:
                if not self.waits(error):
                    raise
