"""One further place of a run's checkpoints: kept up to date by two threads, whatever the place does.

One copies the newest sealed step, and the newest one after that, with patience; it never holds up training. The other
writes the owner's record every two seconds, by which a place that fails is known within five. Read next:
`step_copy.py`, `owner.py`; `locations.py`, which has one of these for each place.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxscale import retry
from jaxscale.checkpoint import layout, listing, step_copy
from jaxscale.checkpoint.layout import DamagedCheckpoint
from jaxscale.checkpoint.owner import Owner, Ownership, OwnershipLost, RunOwned
from jaxscale.checkpoint.patience import UNBROKEN
from jaxscale.checkpoint.retention import Rules, Step, decide
from jaxscale.storage.guarded import Bounds, GuardedStore
from jaxscale.storage.store import Store

logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
BEAT_BOUNDS = Bounds(attempt_seconds=2.5, bytes_per_second=float("inf"), call_seconds=2.5)
"""With BEAT_SECONDS: a place that fails is known after 4.5 s at most."""
COPY_RETRY = retry.RetryConfig()
LOOK_SECONDS = 1.0
"""How often the folder is looked at for a step that somebody else sealed."""
NICE = 10
"""Of the copying thread, where the system has priorities for threads."""

Tell = Callable[..., None]
"""`tell(kind, **fields)`: an event."""


@dataclass(frozen=True)
class LocationState:
    """How a place stands; what locations.json holds of it. Times: seconds since 1970."""

    address: str
    step: int | None = None
    """The newest complete one there."""
    sealed: float | None = None
    """When that step was sealed in the run directory: its age is what would be lost without anything newer."""
    copied: float | None = None
    behind: int | None = None
    """The newest sealed step of the run directory where that is not there yet."""
    failing_since: float | None = None
    reason: str = ""
    generation: int = 0
    """Of the owner; 0: not taken yet."""
    lost: bool = False


class Location:
    """Of a run that this process owns. `changed` is called after each change of `state`, from either thread."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        me: Owner,
        *,
        rules: Rules,
        alarm_after: float,
        tell: Tell,
        changed: Callable[[], None],
        lost: Callable[[Exception], None],
    ) -> None:
        """`folder`: the run's checkpoints. `lost` is told once that another job has the run."""
        self.store = GuardedStore(store, changed=self._on_breaker, retry=COPY_RETRY)
        self.owner = Ownership(GuardedStore(store, BEAT_BOUNDS, retry=UNBROKEN), me)
        self.state = LocationState(store.address)
        self._folder, self._rules, self._alarm_after = folder, rules, alarm_after
        self._tell, self._changed, self._on_lost = tell, changed, lost
        self._generation = 0
        self._refused: set[int] = set()
        self._losses: dict[int, float | None] = {}
        """Of the evaluations of steps that are there."""
        self._copy: step_copy.StepCopy | None = None
        self._problems: dict[str, str] = {}
        """By thread: what is wrong for it."""
        self._is_late = self._is_checked = False
        self._began = time.time()
        self._lock = threading.RLock()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def take(self, generation: int) -> None:
        """Before training: makes this process the owner. Raises RunOwned; OSError, after which it is tried later."""
        self._generation = generation
        self.owner.take(generation)
        self._set(generation=self.owner.generation)

    def begin(self, generation: int, refused: set[int]) -> None:
        """Starts the threads. `refused`: steps that could not be read, and are not copied."""
        self._generation, self._refused = max(self._generation, generation), set(refused)
        for loop in (self._beat, self._copy_all):
            self._threads.append(
                threading.Thread(target=loop, name=f"{loop.__name__} {self.state.address}", daemon=True)
            )
            self._threads[-1].start()

    def sealed(self) -> None:
        """There is a new step to copy."""
        self._wake.set()

    def is_behind(self) -> bool:
        """Whether the newest sealed step is not there yet."""
        newest = layout.newest_step(self._folder)
        return newest is not None and newest not in self._refused and self.state.step != newest

    def close(self, *, unused: bool = False) -> None:
        """Ends the threads and gives the place back. `unused`: nothing was trained."""
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(BEAT_BOUNDS.call_seconds)
        if not self.state.lost and self._generation:
            try:
                self.owner.release(unused=unused)
            except Exception as error:  # the next one waits for the lease to end
                logger.warning("%s was not given back: %s", self.state.address, error)

    # The owner's record

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                if self.state.generation:
                    self.owner.hold()
                else:
                    self.take(self._generation)
            except (OwnershipLost, RunOwned) as error:
                self._lose(error)
                return
            except Exception as error:  # whatever a library makes of an outage: training goes on
                self._problem("owner", error)
            else:
                self._problem("owner", None)
            self._check_age()

    def _check_age(self) -> None:
        """An alarm, once, when what is there is older than allowed and there is something newer."""
        now, since = time.time(), self.state.sealed or self._began
        try:
            is_late = self.is_behind() and now - since > self._alarm_after
        except OSError:  # the first place has its own alarms
            return
        if is_late and not self._is_late:
            what = "nothing" if self.state.step is None else f"step {self.state.step}"
            text = f"{self.state.address}: {what} is the newest there for {now - since:.0f} s"
            self._say("alarm", what="location late", detail=text, location=self.state.address)
        self._is_late = is_late

    # Copies

    def _copy_all(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        failed = 0
        while not self._ended.is_set():
            try:
                did = self._copy_newest()
            except (OwnershipLost, RunOwned) as error:
                self._lose(error)
                return
            except Exception as error:
                failed += 1
                self._problem("copy", error)
                self._ended.wait(retry.pause(UNBROKEN, failed, 0.5))
            else:
                failed = 0
                self._problem("copy", None)
                if not did:
                    self._wake.wait(LOOK_SECONDS)
                    self._wake.clear()

    def _copy_newest(self) -> bool:
        """Whether a step was copied. Raises what the place raises."""
        step = layout.newest_step(self._folder)
        if not self.state.generation or step is None or step in self._refused or step == self.state.step:
            return False
        path = layout.step_folder(self._folder, step)
        try:
            if not self._is_checked and self._is_there(path, step):
                return True
            self._copy_one(path, step)
        except DamagedCheckpoint as error:
            if layout.is_sealed(path):
                self._refused.add(step)
                reason = f"not copied to {self.state.address}: {error}"
                self._say("rejected", tier="durable", step=step, path=str(path), shard="", reason=reason)
                self._say("alarm", what="damaged checkpoint", detail=reason, location=self.state.address)
            self._copy = None
        except FileNotFoundError:
            if layout.is_sealed(path):
                raise
            self._copy = None  # deleted meanwhile, for a newer one
        return True

    def _is_there(self, path: Path, step: int) -> bool:
        """At the start: what an earlier process has copied; what it has half copied is deleted."""
        complete = step_copy.steps_at(self.store)
        for left in set(step_copy.present(self.store)) - set(complete):
            step_copy.delete_step(self.store, left)
        self._is_checked = True
        older = [one for one in complete if one < step]
        if step in complete and step_copy.is_same(self.store, path, step):
            self._is_newest(step, path)
            return True
        if older:
            self._set(step=older[-1])
        return False

    def _copy_one(self, path: Path, step: int) -> None:
        if self._copy is None or self._copy.step != step:
            older = self.state.step if self.state.step is not None and self.state.step < step else None
            self._copy = step_copy.StepCopy(self.store, path, older)
        self._set(behind=step)
        began = time.monotonic()
        size = self._copy.run(self.owner.hold, self.owner.check_now_and_then)
        seconds = round(time.monotonic() - began, 4)
        self._copy = None
        self._is_newest(step, path)
        logger.info("copied step %d to %s: %.1f MB in %.2f s", step, self.state.address, size / 1e6, seconds)
        self._say(
            "sealed",
            tier="durable",
            location=self.state.address,
            step=step,
            bytes=size,
            seconds=seconds,
            blocked_seconds=0.0,
        )
        self._losses.pop(step, None)
        self._expire(step)

    def _expire(self, newest: int) -> None:
        """Deletes there what is not kept any more. Versions and who reads what are known in the run directory."""
        complete = step_copy.steps_at(self.store)
        for step in complete:
            if step not in self._losses:
                self._losses[step] = listing.loss_of(self.store, step)
        known = [Step(one, one in complete, loss=self._losses.get(one)) for one in step_copy.present(self.store)]
        facts = listing.facts(self._folder, time.time(), refused=self._refused)
        for step, because in decide(known, self._rules, facts, newest).items():
            if not because:
                step_copy.delete_step(self.store, step)

    def _is_newest(self, step: int, path: Path) -> None:
        try:
            sealed = (path / layout.MANIFEST).stat().st_mtime
        except OSError:  # deleted just now
            sealed = time.time()
        self._set(step=step, sealed=sealed, copied=time.time(), behind=None)

    # News

    def _problem(self, thread: str, error: Exception | None) -> None:
        with self._lock:
            before = bool(self._problems)
            if error is None:
                self._problems.pop(thread, None)
            else:
                self._problems[thread] = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                )
            if self._problems and not before:
                self._set(failing_since=time.time())
            if not self._problems and before:
                since = self.state.failing_since or time.time()
                self._set(failing_since=None, reason="")
                text = f"{self.state.address} can be used again after {time.time() - since:.1f} s"
                self._say("alarm", what="location back", detail=text, location=self.state.address)
            if self._problems:
                self._set(reason="; ".join(self._problems.values()))
            if self._problems and not before:
                text = f"{self.state.address}: {self.state.reason}; training goes on, steps are copied later"
                self._say("alarm", what="location failing", detail=text, location=self.state.address)

    def _on_breaker(self, change: retry.Change) -> None:
        self._say("alarm", what="breaker", detail=str(change), location=self.state.address)

    def _lose(self, error: Exception) -> None:
        with self._lock:
            if self.state.lost or self._ended.is_set():  # it was given back
                return
            self._set(lost=True, reason=str(error))
        self._say("alarm", what="run lost", detail=str(error), location=self.state.address)
        self._on_lost(error)

    def _set(self, **fields: Any) -> None:
        with self._lock:
            self.state = dataclasses.replace(self.state, **fields)
        self._changed()

    def _say(self, kind: str, **fields: Any) -> None:
        try:
            self._tell(kind, **fields)
        except OSError as error:
            logger.warning("event %s %s was not written: %s", kind, fields, error)
