"""The durable tier: states saved in the background through Orbax, the newest few kept, failures reported and outlived.

`DurableCheckpoints` is the `Snapshot` of a plain run. The free functions of Orbax v1 are used, not its `Checkpointer`:
that one keeps a list of steps of its own and meets on the devices before each save, in the middle of training. What a
saved step looks like is in `layout.py`; read next: `restore.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding

from jaxscale import tree
from jaxscale.checkpoint import agree, layout, leftovers, prune, sharing
from jaxscale.checkpoint.compare import describe
from jaxscale.checkpoint.due import Apart
from jaxscale.checkpoint.held import HeldShard, digests, hold
from jaxscale.checkpoint.interval import AUTO
from jaxscale.checkpoint.manifest import Arrays
from jaxscale.checkpoint.owner import OwnershipLost
from jaxscale.checkpoint.parts import all_parts, own_part
from jaxscale.checkpoint.patience import STORAGE_SECONDS, UNBROKEN, Patience, may_pass
from jaxscale.checkpoint.retention import Rules
from jaxscale.retry import Retry
from jaxscale.train.protocols import Record

logger = logging.getLogger(__name__)

Event = Callable[..., None]
"""`event(kind, **fields)`: a line of events.jsonl."""

SAVED, RUNNING, FAILED = 0, 1, 2
"""How a save goes on one process; of several processes the highest counts."""

POLL_SECONDS = 0.1
QUIET_SECONDS = 10.0
"""How long a save is repeated later at most because another process has not given up the one before."""
SAVE_LIMIT_SECONDS = 1200
"""How long the processes of a world wait for each other before a save counts as failed."""


class SaveFailed(RuntimeError):
    """The last state of the run could not be saved."""


def warm_up() -> threading.Thread:
    """Imports Orbax (0.3 s) in a thread, so that neither the start nor the first save waits for it."""
    thread = threading.Thread(target=load_orbax, name="import-orbax", daemon=True)
    thread.start()
    return thread


class DurableCheckpoints:
    """Saves a state every `every` steps (0: only the last one), or as `apart` says.

    Keeps the `keep` newest and what `retention.py` adds.

    All processes of a world make one and call it at the same steps. `event` receives `sealed` and `alarm` lines;
    `before_seal` runs in the background on process 0 just before a step comes to exist (it makes metrics.jsonl
    durable), `before_save` before anything of a step is written; where they raise OSError the save has failed.
    `since` says from which step on saves are wanted, -1: not yet; the same on all processes.
    `restored` is the step this process started from: that one lies on disk and is not written again.
    `refused` are steps that restore could not read: they do not count among those kept, and go with the next save.
    """

    def __init__(
        self,
        folder: Path,
        every: int | Literal["auto"],
        keep: int,
        *,
        apart: Apart | None = None,
        milestones: int = 0,
        since: Callable[[], int] = lambda: 0,
        restored: int | None = None,
        refused: Collection[int] = (),
        event: Event | None = None,
        before_seal: Callable[[], None] | None = None,
        before_save: Callable[[], None] | None = None,
    ) -> None:
        if (every == AUTO) != (apart is not None):
            raise ValueError(f"every is {every}: `apart` says when saves are due if that is auto, and only then")
        self._folder, self._every, self._apart = folder.absolute(), every, apart
        self._rules = Rules(keep, milestones=milestones)
        self._since, self._answer = since, (-1, False)
        self._event: Event = event or (lambda *_, **__: None)
        self._before_seal = before_seal or (lambda: None)
        self._before_save = before_save or (lambda: None)
        self._saved = {restored}
        self._refused = set(refused)
        self._save: _Save | None = None
        self._given_up: _Save | None = None
        """The last one that failed somewhere."""
        self._failure: tuple[int, BaseException] | None = None
        if jax.process_index() == 0 and (left := layout.sweep(self._folder)):
            logger.info("deleted the unfinished saves of steps %s", ", ".join(left))

    def wants(self, step: int) -> bool:
        """Whether a save is due after this step; the same answer however often it is asked."""
        if step != self._answer[0]:
            self._answer = step, 0 <= self._since() <= step and self._is_due(step)
        return self._answer[1]

    def _is_due(self, step: int) -> bool:
        if self._apart is not None:
            return self._apart.is_due(busy=self._save is not None and self._save.outcome == RUNNING)
        return self._every != AUTO and self._every > 0 and step % self._every == 0

    def offer(self, step: int, state: Mapping[str, Any], record: Record, *, final: bool = False) -> None:
        """Starts saving the state after `step` updates, and returns while it is being written.

        `state`: nested dict of `jax.Array`, any shardings; may be donated as soon as this returns. A step that is not
        due is ignored. A due step is skipped, with a line in the log, while an older save still runs. `final` waits for
        the older one, saves, waits and raises SaveFailed. Raises TypeError for a leaf that is no `jax.Array`.
        """
        if record.step != step:
            raise ValueError(f"the record of step {record.step} was offered with the state of step {step}")
        if not (final or self.wants(step)):
            return
        if not self._settle(wait=final):
            logger.warning("step %d was not saved: an older save still runs; raise checkpoint.every", step)
            if jax.process_index() == 0:  # all processes know, and once is enough
                self._say("alarm", what="save skipped", detail=f"step {step}: an older save still runs")
            return
        patience = Patience(f"saving step {step}")
        if step not in self._saved:
            self._start(step, state, record, final)
        if final:
            self._settle(wait=True)
            while self._failure is not None and patience.waits(self._failure[1]) and self._is_quiet():
                self._start(step, state, record, final)
                self._settle(wait=True)
            self._raise_failure()

    def close(self, limit_seconds: float | None = None) -> None:
        """Waits for the save under way. Raises SaveFailed if the last save failed and no later one succeeded.

        Meets no other process itself, but the save under way does: a process that leaves because of an error gives a
        limit, since the others may be gone. A save that is still under way then counts as failed.
        """
        if self._save is not None:
            self._save.wait(limit_seconds)
            error, step = self._save.error, self._save.step
            if self._save.outcome == RUNNING:
                self._save.abandon()
                error = TimeoutError(f"still under way after {limit_seconds} s")
            self._failure = None if error is None else (step, error)
            self._save = None
        self._raise_failure()

    def _start(self, step: int, state: Mapping[str, Any], record: Record, final: bool) -> None:
        started = time.monotonic()
        self._refused.discard(step)  # what is there from now on is this save
        arrays = describe(state)
        path = layout.step_folder(self._folder, step)
        problem: BaseException | None = None
        response: Any = None
        held: list[HeldShard] = []
        try:
            self._make_room(path)
        except OSError as error:
            problem = error
        if agree.everywhere(problem is None):
            try:
                response, held = begin_save(path, state), hold(state)
            except OSError as error:
                problem = error
        else:
            problem = problem or RuntimeError("process 0 could not make room for it; see its log")
        blocked = time.monotonic() - started

        def complete(is_abandoned: Callable[[], bool]) -> None:
            if problem is not None:
                raise problem
            self._complete(_Written(response, held, arrays, mesh_of(state)), record, started, blocked, is_abandoned)

        is_last = final or step >= record.config.get("steps", step + 1)
        self._save = _Save(step, complete, partial(self._report, is_last=is_last))

    def _make_room(self, path: Path) -> None:
        """Deletes an older save of the same step (one that restore refused) and marks the step as being saved."""
        if jax.process_index() == 0:
            self._before_save()
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                layout.delete_step(path)
            layout.begin(path)

    def _complete(
        self, save: _Written, record: Record, started: float, blocked: float, is_abandoned: Callable[[], bool]
    ) -> None:
        """In the background: waits for Orbax, compares its files with the state, seals the step, deletes old ones."""
        path = layout.step_folder(self._folder, record.step)
        wanted = digests(save.held)
        save.held.clear()  # the arrays' memory is free again
        save.response.result(timeout=SAVE_LIMIT_SECONDS)
        part = own_part(path, wanted, save.arrays)
        if jax.process_index() != 0:
            return
        part = all_parts(path, part, jax.process_count(), SAVE_LIMIT_SECONDS, is_abandoned)
        sharing.share(path, part.files)
        self._before_seal()
        seal = partial(layout.seal, path, record, save.arrays, part, save.mesh)
        size = Retry("durable tier", UNBROKEN, transient=may_pass).call(seal, seconds=STORAGE_SECONDS)
        seconds = time.monotonic() - started
        logger.info("saved step %d: %.1f MB in %.2f s", record.step, size / 1e6, seconds)
        self._say(
            "sealed",
            tier="durable",
            step=record.step,
            bytes=size,
            seconds=round(seconds, 4),
            blocked_seconds=round(blocked, 4),
        )
        if self._apart is not None:
            self._apart.saved(blocked, seconds)
        try:
            prune.expire(self._folder, self._rules, record.step, self._refused)
        except OSError as error:  # the step is safe
            logger.warning("old steps were not deleted from %s: %s", self._folder, error)

    def _settle(self, *, wait: bool) -> bool:
        """Notes how the save under way went, the same on every process; False if it still runs and `wait` is not set.

        One process whose part failed is enough: the others would wait for it in Orbax for minutes, and give up instead.
        """
        save = self._save
        if save is None:
            return True
        while (worst := agree.highest(save.outcome)) == RUNNING:
            if not wait:
                return False
            save.wait(POLL_SECONDS if jax.process_count() > 1 else None)
        self._save = None
        if worst == SAVED:
            self._saved.add(save.step)
            self._failure = None
            return True
        save.abandon()
        self._given_up = save
        self._failure = (save.step, save.error or RuntimeError("another process could not save its part; see its log"))
        if jax.process_index() == 0 and not isinstance(save.error, OwnershipLost):  # else it may be the new owner's
            self._delete(save.step)  # what was written of it only fills the disk
        return True

    def _is_quiet(self) -> bool:
        """Whether no process has anything of the save that failed under way: both would write to one place."""
        if self._given_up is not None:
            self._given_up.wait(QUIET_SECONDS)
        return agree.everywhere(self._given_up is None or self._given_up.outcome != RUNNING)

    def _delete(self, step: int) -> None:
        try:
            layout.delete_step(layout.step_folder(self._folder, step))
        except OSError as error:
            logger.warning("step %d could not be deleted from %s: %s", step, self._folder, error)

    def _say(self, kind: str, **fields: Any) -> None:
        """An event; on a disk that does not even take that line, the log has to do."""
        try:
            self._event(kind, **fields)
        except OSError as error:
            logger.warning("event %s %s was not written: %s", kind, fields, error)

    def _report(self, step: int, error: BaseException, *, is_last: bool) -> None:
        reason = explain(error, self._folder)
        logger.error("step %d could not be saved%s: %s", step, "" if is_last else ", training goes on", reason)
        self._say("alarm", what="save failed", detail=f"step {step}: {reason}")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            step, error = self._failure
            raise SaveFailed(
                f"the state after step {step} could not be saved: {explain(error, self._folder)}; "
                "make room or repair the disk; the same command then goes on from the newest checkpoint"
            ) from error


@dataclass(frozen=True)
class _Written:
    """What a save under way is about."""

    response: Any
    """Orbax's."""
    held: list[HeldShard]
    arrays: Arrays
    mesh: Mapping[str, int]


class _Save:
    """One save under way: runs its completion in a thread, reports a failure at once and keeps it."""

    def __init__(
        self,
        step: int,
        complete: Callable[[Callable[[], bool]], None],
        report: Callable[[int, BaseException], None],
    ) -> None:
        """`complete` gets a function that says whether the save was given up."""
        self.step = step
        self.error: BaseException | None = None
        self._complete, self._report = complete, report
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True)
        self._thread.start()

    @property
    def outcome(self) -> int:
        if self._thread.is_alive():
            return RUNNING
        return SAVED if self.error is None else FAILED

    def wait(self, seconds: float | None = None) -> None:
        """Returns when the save has ended, or after that many seconds."""
        self._thread.join(seconds)

    def abandon(self) -> None:
        """Another process failed and has said so: what this one will find out later is no news."""
        self._abandoned = True

    def _run(self) -> None:
        try:
            self._complete(lambda: self._abandoned)
        except BaseException as error:  # Orbax raises bare exceptions of many kinds; whatever it is, training goes on
            self.error = error
            if not self._abandoned:
                self._report(self.step, error)


def begin_save(path: Path, state: Mapping[str, Any]) -> Any:
    """Starts Orbax on one state; its response's `result()` returns when the commit file is there, or raises.

    Arrays are handed over when this returns: donating them afterwards changes nothing in the file.
    """
    ocp = load_orbax()
    context = ocp.Context()
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    saving = context.array.saving
    saving.use_compression = False  # float32 weights shrink by a tenth and saves take 3 to 20 times longer
    saving.use_ocdbt = False  # a shard is a file: it can be verified, copied and read on its own
    saving.use_replica_parallel = False  # would cut an array of a few bytes into a file for each device
    context.async_options.timeout_secs = SAVE_LIMIT_SECONDS
    with context:
        return ocp.save_checkpointables_async(path, {layout.STATE_ITEM: tree.unflatten(tree.flatten(state))})


def mesh_of(state: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the mesh axes that a state is sharded over; empty where it lies on one device without a mesh."""
    for leaf in tree.flatten(state).values():
        if isinstance(leaf.sharding, NamedSharding):
            return {str(name): int(size) for name, size in leaf.sharding.mesh.shape.items()}
    return {}


def explain(error: BaseException, folder: Path) -> str:
    """One line that says what happened to a save, for people."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    text = " / ".join(dict.fromkeys(str(c).strip().split("\n")[0] or type(c).__name__ for c in causes))
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return f"the disk that holds {folder} is full ({text[:300]})"
    return f"{type(error).__name__}: {text[:300]}"


def load_orbax() -> Any:
    """Orbax's v1 interface, imported at first use."""
    leftovers.quiet()
    from orbax.checkpoint import v1  # type: ignore[import-untyped]  # Orbax ships no types

    return v1
