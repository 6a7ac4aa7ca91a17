"""Reads old steps again, slowly, and mends what has rotted from another copy of it.

A damaged file is replaced by the same file of the same save that another place has, verified on the way; what is whole
is not touched. Works both ways: the run directory from its further locations, and those from the run directory. Read
next: `verify.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import xxhash

from jaxscale.checkpoint import layout, step_copy
from jaxscale.checkpoint.layout import COMMIT_FILE, MANIFEST
from jaxscale.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest
from jaxscale.checkpoint.verify import Damage, verify_step
from jaxscale.storage.store import PART_BYTES, Store


class Pace:
    """Holds a reader to so many bytes a second, on the whole."""

    def __init__(
        self,
        bytes_per_second: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """0: as fast as it goes."""
        self._rate, self._clock, self._sleep = bytes_per_second, clock, sleep
        self._until = clock()

    def __call__(self, nbytes: int) -> None:
        """So many bytes were read: returns when the next may be."""
        if self._rate <= 0:
            return
        self._until = (
            max(self._until, self._clock() - 1.0) + nbytes / self._rate
        )  # a second that was idle is not made up
        if (ahead := self._until - self._clock()) > 0:
            self._sleep(ahead)


@dataclass(frozen=True)
class Scrubbed:
    """What became of a step at a place."""

    damage: Sequence[Damage] = ()
    """What was wrong with it."""
    mended_from: str = ""
    """Address of the place whose files are there now; empty where nothing was mended."""
    left: str = ""
    """Why it is damaged still; empty where it is whole."""


def scrub_step(store: Store, step: int, others: Iterable[Store], pace: Pace, *, mend: bool = True) -> Scrubbed:
    """Verifies a step, and mends it from the first of the other places that has what is missing.

    Raises OSError where the step's own place fails and is no folder of this machine.
    """
    damage = verify_step(store, step, pace)
    if not damage:
        return Scrubbed()
    left = damage[0].reason
    for other in others if mend else ():
        try:
            mend_step(store, other, step, pace)
            again = verify_step(store, step, pace)
        except Exception as error:  # whatever the other place's library makes of an outage: there may be another one
            left = str(error)
            continue
        if not again:
            return Scrubbed(damage, other.address)
        left = again[0].reason
    return Scrubbed(damage, "", left)


def mend_step(store: Store, other: Store, step: int, read: Callable[[int], None] = lambda _: None) -> list[str]:
    """Replaces the files of a step that are not what they should be by those of another place. Returns their names.

    Manifest and commit file come last, as in a copy. Where the manifest of this step can be read, the other one has to
    be the same: else it is of another save, whose files mean nothing here. Raises DamagedCheckpoint, OSError.
    """
    if not step_copy.is_complete(other, step):
        raise DamagedCheckpoint(f"{other.address} has no complete copy of step {step}")
    data, manifest = step_copy.read_manifest(other, step)
    data = layout.json_text(json.loads(data)).encode()  # the bytes as they were written
    mine = manifest_of(store, step)
    if mine is not None and mine != manifest:
        raise DamagedCheckpoint(f"{other.address} has step {step} of another save; its files mean nothing here")
    folder = step_copy.folder_of(step)
    mended = []
    for name in _last_the_commit_file(manifest):
        if not _is_right(store, f"{folder}/{name}", manifest.files[name], read):
            _copy(other, store, f"{folder}/{name}", manifest.files[name], read)
            mended.append(name)
    try:
        is_same = store.read(f"{folder}/{MANIFEST}") == data
    except OSError:
        is_same = False
    if not is_same:
        store.write(f"{folder}/{MANIFEST}", data)
        mended.append(MANIFEST)
    return mended


def manifest_of(store: Store, step: int) -> Manifest | None:
    """None where it cannot be read."""
    try:
        return step_copy.read_manifest(store, step)[1]
    except (DamagedCheckpoint, OSError):
        return None


def _last_the_commit_file(manifest: Manifest) -> list[str]:
    return sorted(manifest.files, key=lambda name: (name == COMMIT_FILE, name))


def _is_right(store: Store, name: str, wanted: FileEntry, read: Callable[[int], None]) -> bool:
    state, done = xxhash.xxh3_128(), 0
    try:
        if store.size(name) != wanted.nbytes:
            return False
        while done < wanted.nbytes:
            chunk = store.read(name, done, min(PART_BYTES, wanted.nbytes - done))
            if not chunk:
                return False
            state.update(chunk)
            done += len(chunk)
            read(len(chunk))
    except OSError:  # what cannot be read is written anew
        return False
    return state.hexdigest() == wanted.digest


def _copy(source: Store, target: Store, name: str, wanted: FileEntry, read: Callable[[int], None]) -> None:
    def chunks() -> Iterable[bytes]:
        state, done = xxhash.xxh3_128(), 0
        while done < wanted.nbytes and (chunk := source.read(name, done, min(PART_BYTES, wanted.nbytes - done))):
            state.update(chunk)
            done += len(chunk)
            read(len(chunk))
            yield chunk
        if (done, state.hexdigest()) != (wanted.nbytes, wanted.digest):
            raise DamagedCheckpoint(f"{source.address}/{name} is damaged too")

    target.write_chunks(name, chunks, wanted.nbytes)
