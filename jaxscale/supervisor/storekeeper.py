"""What the coordinator does in the durable tier, in a thread of its own: storage may hang, a coordinator must not.

Read next: `../checkpoint/finalise.py`, which does the work; `persisting.py`, which decides when.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.finalise import finalise, make_room
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.checkpoint.patience import UNBROKEN, may_pass
from jaxscale.retry import Retry
from jaxscale.supervisor.facts import Store

SEAL_SECONDS = 60.0
"""How long an attempt to make a step of its parts is repeated while storage is away."""

Told = Callable[[Store, str, int], None]
"""`told(what, reason, bytes)`: how it went; the reason is empty where it went well. Called in that thread."""

logger = logging.getLogger(__name__)


class Storekeeper:
    """Of one coordinator: one thing at a time, in order."""

    def __init__(self, checkpoints: Path, metrics: Path, keep: int, told: Told) -> None:
        """`keep`: newest steps that stay when another one is sealed. Touches nothing before the first `do`."""
        self._checkpoints, self._metrics, self._keep, self._told = checkpoints, metrics, keep, told
        self._asked: SimpleQueue[Store] = SimpleQueue()
        self._is_closed = False
        # A daemon: the process must be able to end while the storage hangs.
        self._thread = Thread(target=self._work, name="store", daemon=True)

    def do(self, what: Store) -> None:
        """In the background."""
        self._asked.put(what)
        if self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Begins nothing more; what is under way ends with the process at the latest."""
        self._is_closed = True

    def _work(self) -> None:
        while True:
            what = self._asked.get()
            if self._is_closed:
                return
            self._do(what)

    def _do(self, what: Store) -> None:
        path = layout.step_folder(self._checkpoints, what.step)
        reason, size = "", 0
        try:
            if what.what == "room":
                self._sweep(what.step)
                make_room(path)
            else:
                seal = partial(finalise, path, what.ranks, what.epoch, what.mesh, self._metrics)
                size = Retry("durable tier", UNBROKEN, transient=may_pass).call(seal, seconds=SEAL_SECONDS)
        except Exception as error:  # whatever it is, the run goes on, and is told
            if not isinstance(error, OSError | DamagedCheckpoint):
                logger.exception("step %d could not be saved", what.step)
            reason = str(error) or type(error).__name__
        self._told(what, reason, size)
        if what.what == "finalise" and not reason:
            self._expire(what.step)

    def _sweep(self, step: int) -> None:
        """Deletes older attempts that came to nothing."""
        for other in layout.numbered(self._checkpoints):
            path = layout.step_folder(self._checkpoints, other)
            if other < step and not layout.is_finished(path):
                layout.delete_step(path)

    def _expire(self, newest: int) -> None:
        present, sealed = layout.numbered(self._checkpoints), layout.list_steps(self._checkpoints)
        for step in layout.expired(present, sealed, newest, self._keep):
            try:
                layout.delete_step(layout.step_folder(self._checkpoints, step))
            except OSError as error:
                logger.warning("step %d could not be deleted: %s", step, error)
