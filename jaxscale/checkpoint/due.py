"""When a durable save is due: every so many steps, or so many seconds apart, the same answer on every process.

Clocks differ from process to process, so process 0 decides and the others learn of it at the same step. Read next:
`interval.py`, which says how far apart; `durable.py`, which asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from jaxscale.checkpoint.interval import SaveCosts, allowed, is_noticeable
from jaxscale.train.protocols import World
from jaxscale.world import Agreement

Event = Callable[..., Any]

logger = logging.getLogger(__name__)


class Apart:
    """Saves that are seconds apart. All processes of a world make one, and ask it at the same steps."""

    def __init__(self, world: World, at_most: float, event: Event, clock: Callable[[], float] = time.monotonic) -> None:
        """`at_most`: seconds, the recipe's bound. `event`: told of a new interval and of a step that is too old."""
        self._world, self._at_most, self._tell, self._clock = world, at_most, event, clock
        self._began: float | None = None
        """When the first step was done: what compiles before it is lost with any failure."""
        self._asked = self._saved = 0.0
        self._costs = SaveCosts()
        self._told, self._is_late = 0.0, False
        self._agreement: Agreement | None = None

    def is_due(self, *, busy: bool) -> bool:
        """To be called by all processes once after each step. `busy`: an older save still runs, this one waits."""
        now = self._clock()
        if self._began is None:
            self._began = self._asked = self._saved = now
        asks = self._world.is_writer and self._asks(now, self._began) and not busy
        if self._agreement is None:
            self._agreement = Agreement(self._world, "save")
        if not self._agreement.any_asks(asks):
            return False
        self._agreement, self._asked = None, now  # one agreement is one answer
        return True

    def saved(self, blocked: float, seconds: float) -> None:
        """A save has come to exist: on process 0, in any thread. Both in seconds (see `SaveCosts`)."""
        self._saved, self._is_late = self._clock(), False
        self._costs = self._costs.with_save(blocked, seconds)

    def _asks(self, now: float, began: float) -> bool:
        seconds = self._costs.seconds_between(self._at_most, now - began)
        if self._costs.blocked and is_noticeable(seconds, self._told):
            self._told = seconds
            self._event("interval", tier="durable", seconds=round(seconds, 1))
        if not self._is_late and now - self._saved > allowed(self._at_most):
            self._is_late = True
            detail = f"no durable step for {now - self._saved:.0f} s; allowed are {allowed(self._at_most):.0f}"
            self._event("alarm", what="checkpoint too old", detail=detail)
        return now - self._asked >= seconds

    def _event(self, kind: str, **fields: Any) -> None:
        try:
            self._tell(kind, **fields)
        except OSError as error:  # a full disk, say: training goes on
            logger.warning("event %s %s was not written: %s", kind, fields, error)

    def close(self) -> None:
        """At the end of training, by all processes. Raises WorldError."""
        if self._agreement is not None:
            self._agreement.close()
