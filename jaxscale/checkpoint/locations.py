"""The further places of a run's checkpoints, and whose the run is: all that one process of a run does for them.

    look      before anything is read: refused where a living job has the run
    fetch     brings a step that is newer than those of the run directory from where it is
    repair    replaces a damaged step by the copy of it that a place has
    take      this job becomes the owner at every place that answers
    begin     and of the run directory; from now on new steps are copied, by threads
    check     before a step is written, and before it comes to exist: is this still the owner?
    wait      for the copies of the newest step
    close     ends the threads and gives the run back

A plain run's process 0 does all of it. Of a supervised run the coordinator does, and workers only fetch and repair.
Read next: `location.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import layout, step_copy
from jaxscale.checkpoint.layout import DamagedCheckpoint
from jaxscale.checkpoint.location import Location, Tell
from jaxscale.checkpoint.owner import Ownership, OwnershipLost, RunOwned, this_process
from jaxscale.checkpoint.patience import UNBROKEN
from jaxscale.checkpoint.retention import Rules
from jaxscale.checkpoint.versions import VERSIONS
from jaxscale.config import Config, ConfigError
from jaxscale.storage.addresses import open_store
from jaxscale.storage.guarded import Bounds, GuardedStore
from jaxscale.storage.local_store import LocalStore

logger = logging.getLogger(__name__)

STATES, CONFIG = "locations.json", "config.json"
POLL_SECONDS = 0.1
HOLD_SECONDS = 5.0
"""Between two writes of the owner's record in the run directory: some of them fit into a lease."""
HERE_BOUNDS = Bounds(attempt_seconds=5.0, call_seconds=5.0)


class LocationsUnknown(ConfigError):
    """There is no checkpoint here, and what the further places have cannot be found out."""


class CopyFailed(RuntimeError):
    """The last step of the run is in its directory, and not at every place where it belongs."""


Lost = Callable[[Exception], None]


def _unheard(*_: object, **__: object) -> None: ...


class Locations:
    """Of one run, in one of its processes. `event` is called once `begin` was, with what there was to say before."""

    def __init__(self, run: Path, config: Config, job: str, event: Tell = _unheard, lost: Lost = _unheard) -> None:
        """`run`: its directory. `job`: what an owner is known by. Raises StoreError, ConfigError."""
        self.event, self.lost = event, lost
        """`lost` is told once, in some thread, that another job has taken the run. Both may be changed until `begin`"""
        self._folder, self._states = run / "checkpoints", run / STATES
        self._run, self._begun = run, False
        self._kept: list[tuple[str, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._lost_to: Exception | None = None
        self._job, me = job, this_process(config.name, job)
        self._here = Ownership(GuardedStore(LocalStore(run), HERE_BOUNDS, retry=UNBROKEN), me)
        self._ended = threading.Event()
        self._holder = threading.Thread(target=self._hold_here, name="owner of the run directory", daemon=True)
        self._generation = 0
        self._unreachable: list[str] = []
        self._all: list[Location] = []
        for address in config.checkpoint.locations:
            store = open_store(address)
            _check_place(address, store.address, run)
            self._all.append(
                Location(
                    store,
                    self._folder,
                    me,
                    rules=Rules(config.checkpoint.keep, milestones=config.checkpoint.milestones),
                    alarm_after=config.checkpoint.alarm_after,
                    tell=self._say,
                    changed=self._write_states,
                    lost=self._lose,
                )
            )

    @property
    def generation(self) -> int:
        """Of this owner; 0 before `claim`."""
        return self._generation

    @property
    def has_more(self) -> bool:
        """Whether there is any place beside the run directory."""
        return bool(self._all)

    def look(self) -> None:
        """Raises RunOwned where a living job has the run at any place that answers. Writes nothing."""
        self._here.wait_until_free()
        known = [self._here.look()]
        for location in self._all:
            try:
                location.owner.wait_until_free()
                known.append(location.owner.look())
            except ConfigError:
                raise
            except Exception as error:
                self._cannot(location, error)
        self._generation = 1 + max((owner.generation for owner in known if owner is not None), default=0)

    def is_ours(self) -> bool:
        """Whether an earlier process of this job had the run directory last."""
        return (owner := self._here.look()) is not None and owner.job == self._job

    def take(self) -> None:
        """Takes every place that answered, with one generation; the others later. Raises RunOwned."""
        taken: list[Location] = []
        try:
            for location in self._all:
                if location.state.address not in self._unreachable and not location.state.generation:
                    try:
                        location.take(self._generation)
                        taken.append(location)
                    except ConfigError:
                        raise
                    except Exception as error:
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
        silent: list[str] = []
        for location in self._all:
            try:
                offers += [(step, location) for step in step_copy.steps_at(location.store)]
            except Exception as error:
                silent.append(location.state.address)
                self._cannot(location, error)
        offers = [(step, location) for step, location in offers if here is None or step > here]
        for step, location in sorted(offers, key=lambda offer: -offer[0]):  # stable: the first named place first
            if self._fetch(location, step):
                return step
        if here is None and silent:
            raise LocationsUnknown(
                f"{self._folder} has no checkpoint, and what there is at {', '.join(silent)} cannot be found out; "
                "training does not start afresh over it: repair that place, or leave it out of "
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
        """The run directory is one from here on: takes it, starts the copies, tells what there was to tell.

        Raises RunOwned, OSError.
        """
        self._here.take(max(1, self._generation))
        self._generation = max(self._generation, self._here.generation)
        self._holder.start()
        self.tell()
        for location in self._all:
            location.begin(self._generation, refused)

    def tell(self) -> None:
        """What there was to say goes into the events; what there is from now on, too."""
        with self._lock:
            self._begun, kept, self._kept = True, self._kept, []
        for kind, fields in kept:
            self.event(kind, **fields)

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

    def _hold_here(self) -> None:
        """Writes the record of the run directory again and again: by that a job on another machine knows of this one.

        Where storage fails nothing is said: whatever else is written there says so.
        """
        while not self._ended.wait(HOLD_SECONDS):
            try:
                self._here.hold()
            except (OwnershipLost, RunOwned) as error:
                self._lose(error)
                return
            except Exception as error:
                logger.warning("the owner's record in %s was not written again: %s", self._run, error)

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
        self._ended.set()
        for location in self._all:
            location.close(unused=unused)
        has_begun = self._begun
        if (self._run / CONFIG).exists():
            self.tell()
        if has_begun and self._lost_to is None:
            try:
                self._here.release(unused=unused)
            except Exception as error:  # the next one waits for the lease to end
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
        if not (self._folder / VERSIONS).exists():
            with contextlib.suppress(FileNotFoundError):
                layout.write_text(self._folder / VERSIONS, location.store.read(f"checkpoints/{VERSIONS}").decode())

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
        self.lost(error)

    def _say(self, kind: str, **fields: Any) -> None:
        with self._lock:
            if not self._begun:
                self._kept.append((kind, fields))
                return
        self.event(kind, **fields)

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
