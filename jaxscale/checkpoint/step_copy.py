"""One step of a run at another place: copied there, found there, fetched from there, deleted there.

`checkpoints/<step>/` at the place is the step's folder file for file, so stock Orbax reads it there. The manifest is
written after all other files and the commit file after that, so that a copy that was cut short is none; deleting goes
the other way round. Whatever is read is compared with the digests of the manifest, on the way there and on the way
back. Read next: `location.py`, which decides what is copied when.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from jaxscale.checkpoint import layout
from jaxscale.checkpoint import manifest as manifests
from jaxscale.checkpoint.layout import COMMIT_FILE, FETCHING, MANIFEST
from jaxscale.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest
from jaxscale.storage.store import PART_BYTES, Store

CHECKPOINTS = "checkpoints"
LAST = (MANIFEST, COMMIT_FILE)
FETCHERS = 8
"""Files that are fetched at once."""


def present(store: Store) -> list[int]:
    """Every step that a place has something of, in growing order."""
    names = store.names(CHECKPOINTS)
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)


def is_complete(store: Store, step: int) -> bool:
    """Whether a copy came to its end."""
    return set(LAST) <= set(store.names(folder_of(step)))


def steps_at(store: Store) -> list[int]:
    """Steps that are complete at a place, in growing order."""
    return [step for step in present(store) if is_complete(store, step)]


def is_same(store: Store, path: Path, step: int) -> bool:
    """Whether a complete copy is one of this step, and not of the same number that an earlier start trained."""
    return store.read(f"{folder_of(step)}/{MANIFEST}") == (path / MANIFEST).read_bytes()


class StepCopy:
    """A copy under way. After a failure of the place the same one goes on with the files that are missing."""

    def __init__(self, store: Store, path: Path, before: int | None = None) -> None:
        """`before`: an older step that is complete there; files that it has are copied from it at the place itself."""
        self._store, self._path, self.step = store, path, int(path.name)
        self._before = before
        self._has: Mapping[str, FileEntry] | None = None
        """Of the older step; None: not asked yet."""
        self._folder = folder_of(self.step)
        self._done: dict[str, int] = {}
        self._is_swept = False

    def run(self, commit: Callable[[], None], touch: Callable[[], None] = lambda: None) -> int:
        """Copies the step. Returns its bytes.

        Both may refuse by raising. `commit` is called before the commit file is written, `touch` before anything that
        lies there is deleted or written over: it may be another job's copy of the same step by now. Raises
        DamagedCheckpoint where a file is not as it was written with; OSError of either side.
        """
        manifest = layout.check_files(self._path)
        last = {name: (self._path / name).read_bytes() for name in LAST}
        touch()
        if not self._is_swept:
            delete_step(self._store, self.step)  # half a copy, or one of an earlier start
            self._is_swept = True
        for name, entry in manifest.files.items():
            if name not in self._done and name != COMMIT_FILE:
                touch()
                self._copy(name, entry)
                self._done[name] = entry.nbytes
        self._check_sizes()
        touch()
        self._store.write(f"{self._folder}/{MANIFEST}", last[MANIFEST])
        commit()
        self._store.write(f"{self._folder}/{COMMIT_FILE}", last[COMMIT_FILE])
        return manifest.nbytes

    def _copy(self, name: str, entry: FileEntry) -> None:
        path = self._path / name
        if self._has is None:
            self._has = {} if self._before is None else _files_of(self._store, self._before)
        if self._has.get(name) == entry:
            older = f"{folder_of(self._before or 0)}/{name}"
            if self._store.copy(older, f"{self._folder}/{name}", entry.nbytes):
                return

        def chunks() -> Iterator[bytes]:
            state, read = xxhash.xxh3_128(), 0
            with open(path, "rb") as file:
                while chunk := file.read(PART_BYTES):
                    state.update(chunk)
                    read += len(chunk)
                    yield chunk
            _check(str(path), FileEntry(read, state.hexdigest()), entry)

        self._store.write_chunks(f"{self._folder}/{name}", chunks, entry.nbytes)

    def _check_sizes(self) -> None:
        there = self._store.files(self._folder)
        for name, size in list(self._done.items()):
            if there.get(name) != size:
                del self._done[name]  # the next attempt copies it again
                raise OSError(
                    f"{self._store.address}/{self._folder}/{name} has {there.get(name, 'no')} bytes, though {size} "
                    "were written"
                )


def _files_of(store: Store, step: int) -> Mapping[str, FileEntry]:
    try:
        return read_manifest(store, step)[1].files
    except (DamagedCheckpoint, FileNotFoundError):  # then everything is sent
        return {}


def fetch_step(store: Store, step: int, folder: Path) -> int:
    """Brings a step from a place into `folder`, under its own name once it is whole and verified. Returns its bytes.

    What lies there of that step is replaced then. Raises DamagedCheckpoint, which names the file; OSError.
    """
    path = layout.step_folder(folder, step)
    fresh = path.with_name(path.name + FETCHING)
    data, manifest = read_manifest(store, step)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for parent in {(fresh / name).parent for name in manifest.files}:
            parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(FETCHERS, "fetch") as pool:
            for done in [
                pool.submit(_fetch, store, step, name, entry, fresh / name) for name, entry in manifest.files.items()
            ]:
                done.result()
        (fresh / MANIFEST).write_bytes(data)
        if path.exists():
            layout.delete_step(path)
        os.rename(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return manifest.nbytes


def sweep_fetches(folder: Path) -> None:
    """Deletes what a fetch left that a kill cut short."""
    for left in folder.glob("*" + FETCHING):
        shutil.rmtree(left, ignore_errors=True)


def delete_step(store: Store, step: int) -> None:
    """Deletes a step so that a kill in between leaves nothing that looks like one."""
    order = {COMMIT_FILE: 0, MANIFEST: 1}
    for name in sorted(store.files(folder_of(step)), key=lambda name: (order.get(name, 2), name)):
        store.delete(f"{folder_of(step)}/{name}")


def _fetch(store: Store, step: int, name: str, wanted: FileEntry, path: Path) -> None:
    state, read, where = xxhash.xxh3_128(), 0, f"{store.address}/{folder_of(step)}/{name}"
    with open(path, "wb") as file:
        while read < wanted.nbytes:
            try:
                chunk = store.read(f"{folder_of(step)}/{name}", read, min(PART_BYTES, wanted.nbytes - read))
            except FileNotFoundError as error:
                raise DamagedCheckpoint(f"{where} is missing") from error
            if not chunk:
                break
            file.write(chunk)
            state.update(chunk)
            read += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    _check(where, FileEntry(read, state.hexdigest()), wanted)


def _check(where: str, found: FileEntry, wanted: FileEntry) -> None:
    if found.nbytes != wanted.nbytes:
        raise DamagedCheckpoint(f"{where} has {found.nbytes} bytes; it was written with {wanted.nbytes}")
    if found.digest != wanted.digest:
        raise DamagedCheckpoint(f"{where} is damaged: its digest does not fit")


def read_manifest(store: Store, step: int) -> tuple[bytes, Manifest]:
    """Of a step at a place. Raises DamagedCheckpoint, OSError."""
    where = f"{store.address}/{folder_of(step)}/{MANIFEST}"
    try:
        data = store.read(f"{folder_of(step)}/{MANIFEST}")
        manifest = manifests.decode(json.loads(data), where)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{where} is missing") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} cannot be read ({error})") from error
    if manifest.step != step or COMMIT_FILE not in manifest.files:
        raise DamagedCheckpoint(f"{where} is the manifest of another step, or of one that was never finished")
    return data, manifest


def folder_of(step: int) -> str:
    """Where a step lies at any place."""
    return f"{CHECKPOINTS}/{step}"
