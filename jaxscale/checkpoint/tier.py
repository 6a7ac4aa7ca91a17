"""The durable tier of a run as every process of its world sees it: process 0 does what concerns other places and tells.

Used alike by a plain run, which owns itself, and by a supervised worker, whose coordinator is the owner. Read next:
`locations.py`, all that process 0 does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import agree, layout
from jaxscale.checkpoint.layout import DamagedCheckpoint
from jaxscale.checkpoint.location import Tell
from jaxscale.checkpoint.locations import HERE_BOUNDS, CopyFailed, Locations, LocationsUnknown
from jaxscale.checkpoint.owner import RunOwned, check_job
from jaxscale.checkpoint.patience import STORAGE_SECONDS, UNBROKEN, may_pass
from jaxscale.checkpoint.restore import restore_newest
from jaxscale.config import Config, ConfigError
from jaxscale.retry import Retry
from jaxscale.storage.guarded import GuardedStore
from jaxscale.storage.local_store import LocalStore
from jaxscale.storage.store import StoreError
from jaxscale.train.protocols import Record, World

SHARED = (RunOwned, LocationsUnknown, StoreError, ConfigError, DamagedCheckpoint)
"""Failures of process 0 that every process raises alike; others as RuntimeError."""
SIGN_SECONDS = 20.0
"""Process 0 lets the others know so often that it still works: less than they wait for a word."""


class DurableTier:
    """All processes make one, restore through it, and call `begin` and `close`."""

    def __init__(
        self, run: Path, config: Config, world: World, job: str, event: Tell, *, is_owner: bool = True
    ) -> None:
        """`job`: what an owner is known by. `event` is called on process 0, once the run directory is one.

        is_owner: whether this world takes the run and copies its steps; else the coordinator of that job does.
        """
        self._run, self._config, self._world = run, config, world
        self._job, self._event, self._is_owner = job, event, is_owner
        self._locations: Locations | None = None
        self._here = GuardedStore(LocalStore(run), HERE_BOUNDS, retry=UNBROKEN)
        self._refused: set[int] = set()
        self.on_lost: Callable[[], None] = lambda: None
        """Called once, in some thread, when another job has taken the run."""

    @property
    def refused(self) -> set[int]:
        """Steps of the run directory that could not be read, nor be replaced."""
        return self._refused

    def restore(self, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], Record] | None:
        """Sees that the run is free, brings the newest step from wherever it is, and loads it; None: a fresh start.

        `abstract`: nested dict of `jax.ShapeDtypeStruct` with shardings. Raises what `restore_newest` raises, RunOwned,
        LocationsUnknown, StoreError.
        """
        self._by_first(self._look_and_fetch)

        def rejected(step: int, reason: str) -> None:
            self._refused.add(step)
            if self._world.is_writer:
                path = str(self._run / "checkpoints" / str(step))
                self._event("rejected", tier="durable", step=step, path=path, shard="", reason=reason)

        def repair(step: int) -> bool:
            is_repaired = bool(self._by_first(lambda: self._made().repair(step)))
            if is_repaired:
                self._refused.discard(step)
            return is_repaired

        has_more = bool(self._config.checkpoint.locations)
        return restore_newest(self._run / "checkpoints", abstract, rejected, repair if has_more else None)

    def begin(self) -> None:
        """The run directory is one: steps are copied from now on. Raises RunOwned, OSError."""
        if self._world.is_writer and self._is_owner:
            self._made().begin(self._refused)

    def event(self, kind: str, **fields: Any) -> None:
        """An event of the saves into the run directory; where one says that a step exists, that step is copied."""
        self._event(kind, **fields)
        if kind == "sealed" and self._locations is not None and self._is_owner:
            self._locations.sealed()

    def check(self) -> None:
        """On process 0, before a step is written. Raises OwnershipLost, OSError."""
        if self._is_owner:
            self._made().check()
        else:
            check_job(self._here, self._job)

    def check_patiently(self) -> None:
        """As `check`, before a step comes to exist: an outage of a minute costs no step."""
        Retry("durable tier", UNBROKEN, transient=may_pass).call(self.check, seconds=STORAGE_SECONDS)

    def wait(self) -> None:
        """Until the newest step is at every place. Raises CopyFailed where a place fails for a minute."""
        if self._locations is not None and self._is_owner:
            self._locations.wait(STORAGE_SECONDS)

    def close(self, *, unused: bool = False) -> None:
        """Ends the copies and gives the run back. `unused`: nothing was begun."""
        if self._locations is not None and self._is_owner:
            self._locations.close(unused=unused)
            self._locations = None

    def _made(self) -> Locations:
        if self._locations is None:
            self._locations = Locations(self._run, self._config, self._job, self._event, lambda _: self.on_lost())
        return self._locations

    def _look_and_fetch(self) -> None:
        locations = self._made()
        if self._is_owner:
            locations.look()
            locations.fetch()
            locations.take()
        else:
            locations.tell()  # its run directory is one already
            if layout.newest_step(self._run / "checkpoints") is None:  # else the coordinator has looked
                locations.fetch()

    def _by_first[T](self, work: Callable[[], T]) -> T | Any:
        """What process 0 gets by `work`, on every process (JSON); what it raises, all raise."""
        if self._world.processes == 1:
            return work()
        if not self._world.is_writer:
            while (answer := agree.from_first(None)).get("works"):
                pass
            if "error" in answer:
                kind = next((one for one in SHARED if one.__name__ == answer["kind"]), RuntimeError)
                raise kind(answer["error"])
            return answer["value"]
        result: dict[str, Any] = {}
        thread = threading.Thread(target=_run_into, args=(work, result), name="locations", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(SIGN_SECONDS)
            if thread.is_alive():
                agree.from_first({"works": True})
        if (error := result.get("error")) is not None:
            agree.from_first({"error": str(error), "kind": type(error).__name__})
            raise error
        agree.from_first({"value": result["value"]})
        return result["value"]


def _run_into(work: Callable[[], Any], result: dict[str, Any]) -> None:
    try:
        result["value"] = work()
    except BaseException as error:  # raised by whoever waits
        result["error"] = error


__all__ = ["CopyFailed", "DurableTier"]
