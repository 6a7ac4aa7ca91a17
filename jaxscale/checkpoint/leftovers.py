"""What Orbax leaves behind when a save or a load fails: words on the terminal after the error that says all there is.

Its writes and reads are coroutines on an event loop that is closed with the first failure. Those that end later call
back into the closed loop, those that had not begun are dropped, and of those that fail as well nobody hears; Python
prints a traceback for each, at any moment up to the end of the process. The failure itself is raised by Orbax and
reported by us, so these go to the log.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from typing import Any

logger = logging.getLogger(__name__)

CLOSED_LOOP = "Event loop is closed"
DROPPED = r"coroutine '(async_serialize_from_host|Store)\.[^']*' was never awaited"
UNASKED = "exception was never retrieved"
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
    logging.getLogger("asyncio").addFilter(_passes)


def is_leftover(error: BaseException | None) -> bool:
    """Whether an exception that nobody can catch is one of a callback into a loop that has been closed."""
    return type(error) is RuntimeError and str(error) == CLOSED_LOOP


def _passes(record: logging.LogRecord) -> bool:
    """Whether asyncio's log says it aloud."""
    error = record.exc_info[1] if record.exc_info else None
    if UNASKED not in record.getMessage() or not is_of_a_write(error):
        return True
    logger.debug("another write of a failed save failed: %s", error)
    return False


def is_of_a_write(error: BaseException | None) -> bool:
    """Whether an exception was raised below Orbax, or by tensorstore, whose errors come from no line of Python."""
    if type(error) is ValueError and error.__traceback__ is None:
        return True
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    return any(str(frame.f_globals.get("__name__", "")).startswith("orbax.") for frame, _ in frames)
