"""The steps of a run as a person sees them: which there are, in which state, how large, where else, and why kept.

Cheap: reads manifests, the names and sizes of files, and the small ones; `verify.py` reads everything. No JAX, and
nothing that lies among a run's checkpoints makes it fail. Read next: `retention.py`, whose reasons it shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from jaxscale.checkpoint import holds, layout, step_copy, versions
from jaxscale.checkpoint.layout import COMMIT_FILE, MANIFEST
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.checkpoint.place import Place
from jaxscale.checkpoint.retention import Facts, Rules, Step, decide
from jaxscale.storage.local_store import LocalStore
from jaxscale.storage.store import Store
from jaxscale.track import lines

State = Literal["sealed", "partial", "damaged"]


@dataclass(frozen=True)
class StepStatus:
    """One step; what `jaxscale checkpoints list --json` has of it."""

    step: int
    state: State
    """sealed: all files are there; partial: a save that was never finished; damaged: something of it is gone."""
    nbytes: int = 0
    """Of all its files."""
    time: float | None = None
    """When it was sealed, in seconds since 1970; of others when they were last written to, where that is known."""
    detail: str = ""
    """What is wrong with it, or empty."""
    loss: float | None = None
    """Of its evaluation."""
    kept_because: tuple[str, ...] = ()
    also_at: tuple[str, ...] = ()
    """Addresses of further locations that have a complete copy of that number."""

    def known(self) -> Step:
        """What retention wants to know of it."""
        return Step(self.step, self.state == "sealed", self.time or 0.0, self.loss)


def list_all(place: Place, rules: Rules, now: float, copies: Mapping[str, Collection[int]]) -> list[StepStatus]:
    """Every step at a place, the oldest first. Raises OSError where it cannot be listed.

    `copies`: address of a further location -> the steps that are complete there.
    """
    found = [look(place.store, step) for step in place.steps()]
    known = facts(place.folder, now)
    decisions = decide([one.known() for one in found], rules, known)
    shown = []
    for one in found:
        because = decisions[one.step]
        if one.state == "partial":
            because = because if one.step in known.holds else ("unfinished",)
        also_at = tuple(address for address, steps in copies.items() if one.step in steps)
        shown.append(dataclasses.replace(one, kept_because=because, also_at=also_at))
    return shown


def facts(folder: Path | None, now: float, **more: Any) -> Facts:
    """Versions and holds among a run's checkpoints; none where those are not on this machine."""
    if folder is None:
        return Facts(now=now, **more)
    try:
        names: Mapping[int, Sequence[str]] = versions.read(folder).by_step()
    except OSError:
        names = {}
    return Facts(now=now, versions=names, holds=holds.held(folder, now), **more)


def look(store: Store, step: int) -> StepStatus:
    """One step, whatever is there. Raises OSError where a place fails that is no folder of this machine."""
    folder = step_copy.folder_of(step)
    where = f"{store.address}/{folder}"
    try:
        there = store.files(folder)
        if COMMIT_FILE not in there:
            return _unfinished(store, step, there)
        if MANIFEST not in there and _is_marked(store, step):
            return _partial(store, step, there)
        _, manifest = step_copy.read_manifest(store, step)
    except (DamagedCheckpoint, OSError) as error:
        if not isinstance(error, DamagedCheckpoint) and not isinstance(store, LocalStore):
            raise
        return StepStatus(step, "damaged", time=_written(store, step), detail=str(error))
    nbytes = sum(there.values())
    sealed = manifest.facts.get("time")  # not in those of before
    time = sealed if isinstance(sealed, float) and math.isfinite(sealed) else _written(store, step)
    with_arrays = {shard.file for shards in manifest.shards.values() for shard in shards}
    for name, entry in manifest.files.items():
        reason = ""
        if name not in there:
            reason = "is missing"
        elif there[name] != entry.nbytes:
            reason = f"has {there[name]} bytes; it was written with {entry.nbytes}"
        elif name not in with_arrays:
            reason = _small(store, f"{folder}/{name}", entry.digest)
        if reason:
            return StepStatus(step, "damaged", nbytes, time, f"{where}/{name} {reason}")
    return StepStatus(step, "sealed", nbytes, time, "", loss_of(store, step))


def loss_of(store: Store, step: int) -> float | None:
    """Of the step's own evaluation, where it has one and it is finite."""
    try:
        return loss_in(store.read(f"{step_copy.folder_of(step)}/{layout.RECORD[0]}"))
    except OSError:
        return None


def loss_in(record: bytes) -> float | None:
    """As `loss_of`, of the text of a record."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = versions.evaluation_of(lines.unmark(json.loads(record)["metrics_line"]))
        if found is not None and math.isfinite(found.loss):
            return found.loss
    return None


def _small(store: Store, name: str, digest: str) -> str:
    """What is wrong with a file without arrays; empty where nothing is."""
    try:
        found = xxhash.xxh3_128_hexdigest(store.read(name))
    except OSError as error:
        if not isinstance(store, LocalStore):
            raise
        return f"cannot be read ({error.strerror or error})"
    return "" if found == digest else "is damaged: its digest does not fit"


def _unfinished(store: Store, step: int, there: Mapping[str, int]) -> StepStatus:
    """Without a commit file: a save or a copy that never came to its end, or a step that has lost the file since.

    The record is written when a step is sealed, and the mark goes last: files of it without mark were once a step. At a
    further location the manifest comes last but one, and there are no marks.
    """
    if there.keys() & {MANIFEST, *layout.RECORD[:1]} and not _is_marked(store, step) and _is_run(store):
        detail = (
            f"{store.address}/{step_copy.folder_of(step)}/{COMMIT_FILE} is missing, though the step was sealed once"
        )
        return StepStatus(step, "damaged", sum(there.values()), _written(store, step), detail)
    return _partial(store, step, there)


def _partial(store: Store, step: int, there: Mapping[str, int]) -> StepStatus:
    return StepStatus(step, "partial", sum(there.values()), _written(store, step), "its save was never finished")


def _is_marked(store: Store, step: int) -> bool:
    return f"{step}{layout.SAVING}" in store.names(step_copy.CHECKPOINTS)


def _is_run(store: Store) -> bool:
    """A run directory, whose saves leave marks; no further location."""
    return isinstance(store, LocalStore) and Path(store.address, "config.json").is_file()


def _written(store: Store, step: int) -> float | None:
    """When its manifest, or the folder, was written, where it lies on this machine."""
    path = Path(store.address, step_copy.folder_of(step))
    for one in (path / MANIFEST, path) if isinstance(store, LocalStore) else ():
        with contextlib.suppress(OSError):
            return one.lstat().st_mtime
    return None
