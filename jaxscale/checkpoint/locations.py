"""The further places of a run's checkpoints, and whose the run is: everything that process 0 of a world does for them.

    claim     before anything is restored: this job becomes the owner, or is refused
    fetch     brings a step that is newer than those of the run directory from where it is
    repair    replaces a damaged step by the copy of it that a place has
    begin     from now on new steps are copied, by threads
    close     waits for the copy of the last step

Of the run directory itself only the ownership is looked after here. Read next: `location.py`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import layout, step_copy
from jaxscale.checkpoint.layout import DamagedCheckpoint
from jaxscale.checkpoint.location import Location, Tell
from jaxscale.checkpoint.owner import Owner, Ownership, OwnershipLost, this_process
from jaxscale.config_error import ConfigError
from jaxscale.storage.addresses import open_store
from jaxscale.storage.local_store import LocalStore

logger = logging.getLogger(__name__)

STATES, CONFIG = "locations.json", "config.json"
POLL_SECONDS = 0.1


class LocationsUnknown(ConfigError):
    """There is no checkpoint here, and what the further places have cannot be found out."""


class CopyFailed(RuntimeError):
    """The last step of the run is in its directory, and not at every place where it belongs."""


class Locations:
    """Of one run, in process 0. `event` is called once `begin` was; what there is to say before is kept until then."""

    def __init__(
        self,
        run: Path,
        addresses: Sequence[str],
        *,
        name: str,
        job: str,
        keep: int,
        alarm_after: float,
        event: Tell,
        lost: Callable[[Exception], None],
    ) -> None:
        """`run`: its directory. `lost` is told once that another job has taken the run. Raises StoreError."""
        self._folder, self._states = run / "checkpoints", run / STATES
        self._run, self._event, self._begun = run, event, False
        self._kept: list[tuple[str, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._lost_to: Exception | None = None
        self._tell_lost = lost
        me = this_process(name, job)
        self._here = Ownership(LocalStore(run), me)
        self._generation = 0
        self._unreachable: list[str] = []
        self._all: list[Location] = []
        for address in addresses:
            store = open_store(address)
            _check_place(address, store.address, run)
            self._all.append(
                Location(
                    store,
                    self._folder,
                    me,
                    keep=keep,
                    alarm_after=alarm_after,
                    tell=self._say,
                    changed=self._write_states,
                    lost=self._lose,
                )
            )

    @property
    def generation(self) -> int:
        """Of this owner; 0 before `claim`."""
        return self._generation

    def claim(self) -> None:
        """Takes every place that answers, with one generation. Raises RunOwned where a living job has one of them."""
        known: list[Owner | None] = [self._here.look()]
        for location in self._all:
            try:
                known.append(location.owner.look())
            except OSError as error:
                self._cannot(location, error)
        self._generation = 1 + max((owner.generation for owner in known if owner is not None), default=0)
        taken: list[Location] = []
        try:
            for location in self._all:
                if location.state.address not in self._unreachable:
                    try:
                        location.take(self._generation)
                        taken.append(location)
                    except OSError as error:
                        self._cannot(location, error)
        except ConfigError:
            for location in taken:
                location.close(unused=True)
            raise

    def fetch(self) -> int | None:
        """Brings the newest readable step from wherever it is, if that is newer than those of the run directory.

        Returns the step, None where nothing was fetched. Raises LocationsUnknown where nothing is here and a place does
        not say what it has; DamagedCheckpoint where nothing is here and no copy can be read.
        """
        if not self._all:
            return None
        here = layout.newest_step(self._folder)
        offers: list[tuple[int, Location]] = []
        for location in self._all:
            try:
                offers += [(step, location) for step in step_copy.steps_at(location.store)]
            except Exception as error:
                self._cannot(location, error)
        offers = [(step, location) for step, location in offers if here is None or step > here]
        for step, location in sorted(offers, key=lambda offer: -offer[0]):  # stable: the first named place first
            if self._fetch(location, step):
                return step
        if here is None and self._unreachable:
            raise LocationsUnknown(
                f"{self._folder} has no checkpoint, and what there is at {', '.join(self._unreachable)} cannot be "
                "found out; training does not start afresh over it: repair that place, or leave it out of "
                "checkpoint.locations"
            )
        if here is None and offers:
            raise DamagedCheckpoint(
                f"{self._folder} has no checkpoint, and none of the {len(offers)} at other locations can be read; "
                "training does not start afresh over them"
            )
        return None

    def repair(self, step: int) -> bool:
        """Replaces a step of the run directory that cannot be read by a copy of it. False where there is none."""
        for location in self._all:
            try:
                has = step_copy.is_complete(location.store, step)
            except Exception as error:
                self._cannot(location, error)
                continue
            if has and self._fetch(location, step):
                logger.warning("the damaged checkpoint of step %d was replaced from %s", step, location.state.address)
                return True
        return False

    def begin(self, refused: set[int]) -> None:
        """The run directory is one from here on: takes it, starts the copies, tells what there was to tell."""
        self._here.take(max(1, self._generation), asks=False)  # its lock has kept others out
        self._generation = max(self._generation, self._here.generation)
        self._flush()
        for location in self._all:
            location.begin(self._generation, refused)

    def check(self) -> None:
        """Before anything of a step is written, and before it comes to exist. Raises OwnershipLost, OSError."""
        if isinstance(self._lost_to, OwnershipLost):
            raise self._lost_to
        if self._lost_to is not None:
            raise OwnershipLost(str(self._lost_to))
        try:
            self._here.check()
        except OwnershipLost as error:
            self._lose(error)
            raise

    def sealed(self) -> None:
        """A step has come to exist in the run directory."""
        for location in self._all:
            location.sealed()

    def wait(self, seconds: float) -> None:
        """Waits for the copies of the newest step: while they go on, and for `seconds` where a place fails.

        Raises CopyFailed.
        """
        until = time.monotonic() + seconds
        while behind := [one for one in self._all if not one.state.lost and one.is_behind()]:
            failing = [one for one in behind if one.state.failing_since is not None or not one.state.generation]
            if failing and time.monotonic() > until:
                what = "; ".join(f"{one.state.address}: {one.state.reason or 'not taken yet'}" for one in failing)
                raise CopyFailed(
                    f"step {layout.newest_step(self._folder)} is safe in {self._folder}, and not copied to {what}; "
                    "the same command copies it once the place can be used"
                )
            if not failing:
                until = time.monotonic() + seconds
            time.sleep(POLL_SECONDS)

    def close(self, *, unused: bool = False) -> None:
        """Ends the copies, wherever they are, and gives the run back. `unused`: it never began."""
        for location in self._all:
            location.close(unused=unused)
        has_begun = self._begun
        if (self._run / CONFIG).exists():
            self._flush()
        if has_begun and self._lost_to is None:
            try:
                self._here.release()
            except OSError as error:
                logger.warning("the run directory was not given back: %s", error)

    def _fetch(self, location: Location, step: int) -> bool:
        began, where = time.monotonic(), f"{location.state.address}/{step_copy.CHECKPOINTS}/{step}"
        try:
            self._make_run(location, step)
            size = step_copy.fetch_step(location.store, step, self._folder)
        except (DamagedCheckpoint, ValueError) as error:
            logger.warning("THE COPY OF STEP %d AT %s IS DAMAGED and will not be used: %s", step, where, error)
            address, reason = location.state.address, str(error)
            self._say("rejected", tier="durable", location=address, step=step, path=where, shard="", reason=reason)
            return False
        except Exception as error:
            self._cannot(location, error)
            return False
        seconds = time.monotonic() - began
        logger.info("fetched step %d from %s: %.1f MB in %.2f s", step, where, size / 1e6, seconds)
        self._say("fetched", step=step, location=location.state.address, bytes=size, seconds=round(seconds, 4))
        return True

    def _make_run(self, location: Location, step: int) -> None:
        """A folder that holds checkpoints is a run directory, also where this start is cut short after the fetch."""
        if not (self._run / CONFIG).exists():
            config = json.loads(location.store.read(f"{step_copy.CHECKPOINTS}/{step}/{CONFIG}"))
            layout.write_json(self._run / CONFIG, config)
        self._folder.mkdir(parents=True, exist_ok=True)
        step_copy.sweep_fetches(self._folder)

    def _cannot(self, location: Location, error: Exception) -> None:
        address = location.state.address
        logger.warning("%s cannot be used now: %s", address, error)
        if address not in self._unreachable:
            self._unreachable.append(address)
            text = f"{address}: {type(error).__name__}: {error}"
            self._say("alarm", what="location failing", detail=text, location=address)

    def _lose(self, error: Exception) -> None:
        with self._lock:
            if self._lost_to is not None:
                return
            self._lost_to = error
        logger.error("%s", error)
        self._tell_lost(error)

    def _say(self, kind: str, **fields: Any) -> None:
        with self._lock:
            if not self._begun:
                self._kept.append((kind, fields))
                return
        self._event(kind, **fields)

    def _flush(self) -> None:
        with self._lock:
            self._begun, kept, self._kept = True, self._kept, []
        for kind, fields in kept:
            self._event(kind, **fields)

    def _write_states(self) -> None:
        if not self._begun:
            return
        with self._lock:
            try:
                layout.write_json(self._states, [dataclasses.asdict(one.state) for one in self._all])
            except OSError as error:  # a full disk has its own alarms
                logger.warning("%s was not written: %s", self._states, error)


def _check_place(given: str, address: str, run: Path) -> None:
    if "://" not in address and Path(address).is_relative_to(run.absolute()):
        raise ConfigError(
            f"checkpoint.locations has {given}, which lies in the run directory {run}; a further location is to be "
            "elsewhere: another disk, another machine, another region"
        )
