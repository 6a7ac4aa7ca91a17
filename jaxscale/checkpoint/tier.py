"""The durable tier of a run as every process of its world sees it: process 0 does what concerns other places and tells.

Used alike by a plain run and by a supervised worker. Read next: `locations.py`, all that process 0 does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import agree
from jaxscale.checkpoint.layout import DamagedCheckpoint
from jaxscale.checkpoint.location import Tell
from jaxscale.checkpoint.locations import CopyFailed, Locations, LocationsUnknown
from jaxscale.checkpoint.owner import OwnershipLost, RunOwned
from jaxscale.checkpoint.patience import STORAGE_SECONDS
from jaxscale.checkpoint.restore import restore_newest
from jaxscale.config import Config, ConfigError
from jaxscale.storage.store import StoreError
from jaxscale.train.protocols import Record, World

SHARED = (RunOwned, LocationsUnknown, StoreError, ConfigError, DamagedCheckpoint)
"""Failures of process 0 that every process raises alike; others as RuntimeError."""
SIGN_SECONDS = 20.0
"""Process 0 lets the others know so often that it still works: less than they wait for a word."""


class DurableTier:
    """All processes make one, restore through it, and call `begin` and `close`."""

    def __init__(self, run: Path, config: Config, world: World, job: str, event: Tell) -> None:
        """`job`: what an owner is known by. `event` is called on process 0, once the run directory is one."""
        self._run, self._config, self._world = run, config, world
        self._job, self._event = job, event
        self._locations: Locations | None = None
        self._lost: Exception | None = None
        self._refused: set[int] = set()
        self.on_lost: Callable[[], None] = lambda: None
        """Called once, in some thread, when another job has taken the run."""

    @property
    def refused(self) -> set[int]:
        """Steps of the run directory that could not be read, nor be replaced."""
        return self._refused

    def restore(self, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], Record] | None:
        """Takes the run, brings the newest step from wherever it is, and loads it onto this mesh; None: a fresh start.

        `abstract`: nested dict of `jax.ShapeDtypeStruct` with shardings. Raises what `restore_newest` raises, RunOwned,
        LocationsUnknown, StoreError.
        """
        self._by_first(self._claim_and_fetch)

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

    def claim(self) -> None:
        """Takes the run where nothing is restored from the durable tier."""
        self._by_first(lambda: self._made().claim())

    def begin(self) -> None:
        """The run directory is one: steps are copied from now on."""
        if self._world.is_writer:
            self._made().begin(self._refused)

    def event(self, kind: str, **fields: Any) -> None:
        """An event of the saves into the run directory; where one says that a step exists, that step is copied."""
        self._event(kind, **fields)
        if kind == "sealed" and self._locations is not None:
            self._locations.sealed()

    def check(self) -> None:
        """On process 0, before a step is written and before it comes to exist. Raises OwnershipLost, OSError."""
        self._made().check()

    def raise_if_lost(self) -> None:
        """On process 0: raises OwnershipLost once it is known that another job has the run."""
        if self._lost is not None:
            raise self._lost if isinstance(self._lost, OwnershipLost) else OwnershipLost(str(self._lost))

    def wait(self) -> None:
        """Until the newest step is at every place. Raises CopyFailed where a place fails for a minute."""
        if self._locations is not None:
            self.raise_if_lost()
            self._locations.wait(STORAGE_SECONDS)

    def close(self, *, unused: bool = False) -> None:
        """Ends the copies and gives the run back. `unused`: nothing was begun."""
        if self._locations is not None:
            self._locations.close(unused=unused)
            self._locations = None

    def _made(self) -> Locations:
        if self._locations is None:
            checkpoint = self._config.checkpoint
            self._locations = Locations(
                self._run,
                checkpoint.locations,
                name=self._config.name,
                job=self._job,
                keep=checkpoint.keep,
                alarm_after=checkpoint.alarm_after,
                event=self._event,
                lost=self._lose,
            )
        return self._locations

    def _claim_and_fetch(self) -> None:
        self._made().claim()
        self._made().fetch()

    def _lose(self, error: Exception) -> None:
        self._lost = error
        self.on_lost()

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
