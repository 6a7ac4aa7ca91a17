"""What the coordinator does in the durable tier, in a thread of its own: storage may hang, a coordinator must not.

It makes steps of what hosts have written, and owns the run: it takes it once the coordinator leads, looks before each
commit whether it still has it, and copies sealed steps to further locations. Read next: `../checkpoint/finalise.py`,
which does the work; `../checkpoint/locations.py`; `persisting.py`, which decides when.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from jaxscale.checkpoint import layout, prune
from jaxscale.checkpoint.finalise import finalise
from jaxscale.checkpoint.locations import CopyFailed, Locations
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.checkpoint.owner import RunOwned
from jaxscale.checkpoint.patience import UNBROKEN, may_pass
from jaxscale.checkpoint.retention import Rules
from jaxscale.checkpoint.room import make_room
from jaxscale.retry import Retry
from jaxscale.supervisor.facts import Store

SEAL_SECONDS = 60.0
"""How long an attempt to make a step of its parts is repeated while storage is away."""

Told = Callable[[Store, str, int], None]
"""`told(what, reason, bytes)`: how it went; the reason is empty where it went well. Called in that thread."""

logger = logging.getLogger(__name__)


class Storekeeper:
    """Of one coordinator: one thing at a time, in order."""

    def __init__(
        self, checkpoints: Path, metrics: Path, rules: Rules, told: Told, locations: Locations | None = None
    ) -> None:
        """`rules`: which steps stay when another one is sealed. Touches nothing before `begin`.

        `locations`: where further copies go and whose the run is; None where the run belongs to nobody, as in tests.
        """
        self._checkpoints, self._metrics, self._rules, self._told = checkpoints, metrics, rules, told
        self._locations, self._is_owner = locations, locations is None
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_closed = False
        # A daemon: the process must be able to end while the storage hangs.
        self._thread = Thread(target=self._work, name="store", daemon=True)

    def begin(self) -> None:
        """This coordinator leads: it becomes the owner, in the background, and steps are copied from then on."""
        self._ask(self._try_to_own)

    def do(self, what: Store) -> None:
        """In the background."""
        self._ask(lambda: self._do(what))

    def finish(self, seconds: float, told: Callable[[str], None]) -> None:
        """In the background: waits for the copies of the last step, for `seconds` where a place fails.

        `told`: what is missing then, empty where nothing is. Called in that thread; at once where there are no copies.
        """
        if self._locations is None or not self._locations.has_more:
            told("")
        else:
            self._ask(lambda: told(self._missing(seconds)))

    def close(self, *, unused: bool = False) -> None:
        """Begins nothing more; what is under way ends with the process at the latest. `unused`: nothing was trained."""
        self._is_closed = True
        if self._locations is not None:
            self._locations.close(unused=unused)

    def _ask(self, work: Callable[[], None]) -> None:
        self._asked.put(work)
        if self._thread.ident is None:
            self._thread.start()

    def _work(self) -> None:
        while True:
            work = self._asked.get()
            if self._is_closed:
                return
            work()

    def _missing(self, seconds: float) -> str:
        assert self._locations is not None
        self._try_to_own()
        try:
            if self._is_owner:
                self._locations.wait(seconds)
        except (CopyFailed, OSError) as error:
            return str(error)
        return ""

    def _try_to_own(self) -> None:
        """Where storage fails this becomes the owner with the next thing that is done."""
        try:
            self._own()
        except Exception as error:
            logger.warning("the run was not taken: %s", error)

    def _own(self) -> None:
        """Raises RunOwned, OSError."""
        if not self._is_owner and self._locations is not None:
            try:
                self._locations.take()
                self._locations.begin(set())
            except RunOwned as error:
                self._locations.lost(error)
                raise
            self._is_owner = True

    def _check(self) -> None:
        """Raises OwnershipLost, RunOwned, OSError."""
        self._own()
        if self._locations is not None:
            self._locations.check()

    def _do(self, what: Store) -> None:
        path = layout.step_folder(self._checkpoints, what.step)
        reason, size = "", 0
        try:
            if what.what == "room":
                self._check()
                self._sweep(what.step)
                make_room(path, what.epoch)
            else:
                seal = partial(finalise, path, what.ranks, what.epoch, what.mesh, self._metrics, self._check)
                size = Retry("durable tier", UNBROKEN, transient=may_pass).call(seal, seconds=SEAL_SECONDS)
        except Exception as error:  # whatever it is, the run goes on, and is told
            if not isinstance(error, OSError | DamagedCheckpoint | RunOwned):
                logger.exception("step %d could not be saved", what.step)
            reason = str(error) or type(error).__name__
        self._told(what, reason, size)
        if what.what == "finalise" and not reason:
            if self._locations is not None:
                self._locations.sealed()
            self._expire(what.step)

    def _sweep(self, step: int) -> None:
        """Deletes older attempts that came to nothing."""
        for other in layout.numbered(self._checkpoints):
            path = layout.step_folder(self._checkpoints, other)
            if other < step and not layout.is_finished(path):
                layout.delete_step(path)

    def _expire(self, newest: int) -> None:
        try:
            prune.expire(self._checkpoints, self._rules, newest)
        except OSError as error:
            logger.warning("old steps were not deleted from %s: %s", self._checkpoints, error)
