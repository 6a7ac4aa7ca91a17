"""What Orbax leaves behind when a save or a load fails: words on the terminal after the error that says all there is.

Its writes and reads are coroutines on an event loop that is closed with the first failure. Those that end later call
back into the closed loop, and those that had not begun are dropped; Python prints a traceback for each, at any moment
up to the end of the process. The failure itself is raised by Orbax and reported by us, so these go to the log.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from typing import Any

logger = logging.getLogger(__name__)

CLOSED_LOOP = "Event loop is closed"
DROPPED = r"coroutine '(async_serialize_from_host|Store)\.[^']*' was never awaited"
_once = threading.Lock()


def quiet() -> None:
    """From now on those words go to the debug log; everything else is printed as ever. Once is enough."""
    if not _once.acquire(blocking=False):
        return
    warnings.filterwarnings("ignore", message=DROPPED, category=RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if is_leftover(unraisable.exc_value):
            logger.debug("a write of a failed save ended after it: %s", unraisable.exc_value)
        else:
            before(unraisable)

    sys.unraisablehook = hook


def is_leftover(error: BaseException | None) -> bool:
    """Whether an exception that nobody can catch is one of a callback into a loop that has been closed."""
    return type(error) is RuntimeError and str(error) == CLOSED_LOOP
