"""One step of a run at another place: copied there, found there, fetched from there, deleted there.

`checkpoints/<step>/` at the place is the step's folder file for file, and `copied.json` more: bytes and xxh3_128 of
each file as they were read for the copy. It is written after the files, then the manifest, then the commit file, so
that a copy that was cut short is none; deleting goes the other way round. Read next: `location.py`, which decides what
is copied when.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import xxhash

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.layout import COMMIT_FILE, MANIFEST, DamagedCheckpoint
from jaxscale.storage.store import PART_BYTES, Store

CHECKPOINTS = "checkpoints"
COPIED, FORMAT = "copied.json", 1
LAST = (MANIFEST, COMMIT_FILE)
RECORD = "record.json"
FETCHING = ".fetching"
FETCHERS = 8
"""Files that are fetched at once."""


class Copied(NamedTuple):
    """A file as it was read for a copy."""

    bytes: int
    xxh3_128: str


def present(store: Store) -> list[int]:
    """Every step that a place has something of, in growing order."""
    names = store.names(CHECKPOINTS)
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)


def is_complete(store: Store, step: int) -> bool:
    """Whether a copy came to its end."""
    return {COPIED, *LAST} <= set(store.names(_folder(step)))


def steps_at(store: Store) -> list[int]:
    """Steps that are complete at a place, in growing order."""
    return [step for step in present(store) if is_complete(store, step)]


def is_same(store: Store, path: Path, step: int) -> bool:
    """Whether a complete copy is one of this step, and not of the same number that an earlier start trained."""
    return all(store.read(f"{_folder(step)}/{name}") == (path / name).read_bytes() for name in (MANIFEST, RECORD))


class StepCopy:
    """A copy under way. After a failure of the place the same one goes on with the files that are missing."""

    def __init__(self, store: Store, path: Path) -> None:
        self._store, self._path, self.step = store, path, int(path.name)
        self._folder = _folder(self.step)
        self._done: dict[str, Copied] = {}
        self._is_swept = False

    def run(self, commit: Callable[[], None]) -> int:
        """Copies the step; `commit` is called before the commit file is written, and may refuse. Returns its bytes.

        Raises DamagedCheckpoint where a file is not as it was written with; OSError of either side.
        """
        files = written_with(self._path)
        if not self._is_swept:
            delete_step(self._store, self.step)  # half a copy, or one of an earlier start
            self._is_swept = True
        for name, (size, digest) in files.items():
            if name not in self._done and name not in LAST:
                self._done[name] = self._copy(name, size, digest)
        self._check_sizes()
        last = {name: (self._path / name).read_bytes() for name in LAST}
        self._write(COPIED, _table(self._done | {name: _copied(data) for name, data in last.items()}))
        self._write(MANIFEST, last[MANIFEST])
        commit()
        self._write(COMMIT_FILE, last[COMMIT_FILE])
        return sum(size for size, _ in files.values())

    def _copy(self, name: str, size: int, digest: str) -> Copied:
        path, found = self._path / name, digest

        def chunks() -> Iterator[bytes]:
            nonlocal found
            state, read = xxhash.xxh3_128(), 0
            with open(path, "rb") as file:
                while chunk := file.read(PART_BYTES):
                    state.update(chunk)
                    read += len(chunk)
                    yield chunk
            found = state.hexdigest()
            if read != size:
                raise DamagedCheckpoint(f"{path} has {read} bytes; it was written with {size}")
            if digest not in ("", found):
                raise DamagedCheckpoint(f"{path} has the digest {found}; it was written with {digest}")

        self._store.write_chunks(f"{self._folder}/{name}", chunks, size)
        return Copied(size, found)

    def _check_sizes(self) -> None:
        there = self._store.files(self._folder)
        for name, copied in list(self._done.items()):
            if there.get(name) != copied.bytes:
                del self._done[name]  # the next attempt copies it again
                raise OSError(
                    f"{self._store.address}/{self._folder}/{name} has {there.get(name, 'no')} bytes, though "
                    f"{copied.bytes} were written"
                )

    def _write(self, name: str, data: bytes) -> None:
        self._store.write(f"{self._folder}/{name}", data)


def written_with(path: Path) -> dict[str, tuple[int, str]]:
    """Files of a sealed step -> bytes and digest (empty where an older manifest has none). Raises DamagedCheckpoint."""
    files = layout.check_files(path).files
    found = {name: (entry.nbytes, entry.digest) for name, entry in files.items()}
    return {**found, MANIFEST: ((path / MANIFEST).stat().st_size, "")}


def fetch_step(store: Store, step: int, folder: Path) -> int:
    """Brings a step from a place into `folder`, under its own name once it is whole and verified. Returns its bytes.

    What lies there of that step is replaced then. Raises DamagedCheckpoint, which names the file; OSError.
    """
    path = layout.step_folder(folder, step)
    fresh = path.with_name(path.name + FETCHING)
    files = _read_table(store, step)
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        for parent in {(fresh / name).parent for name in files}:
            parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(FETCHERS, "fetch") as pool:
            for done in [pool.submit(_fetch, store, step, name, one, fresh / name) for name, one in files.items()]:
                done.result()
        if path.exists():
            layout.delete_step(path)
        os.rename(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return sum(one.bytes for one in files.values())


def sweep_fetches(folder: Path) -> None:
    """Deletes what a fetch left that a kill cut short."""
    for left in folder.glob("*" + FETCHING):
        shutil.rmtree(left, ignore_errors=True)


def delete_step(store: Store, step: int) -> None:
    """Deletes a step so that a kill in between leaves nothing that looks like one."""
    order = {COMMIT_FILE: 0, MANIFEST: 1}
    for name in sorted(store.files(_folder(step)), key=lambda name: (order.get(name, 2), name)):
        store.delete(f"{_folder(step)}/{name}")


def _fetch(store: Store, step: int, name: str, wanted: Copied, path: Path) -> None:
    state, read, where = xxhash.xxh3_128(), 0, f"{store.address}/{_folder(step)}/{name}"
    with open(path, "wb") as file:
        while read < wanted.bytes:
            try:
                chunk = store.read(f"{_folder(step)}/{name}", read, min(PART_BYTES, wanted.bytes - read))
            except FileNotFoundError as error:
                raise DamagedCheckpoint(f"{where} is missing") from error
            if not chunk:
                raise DamagedCheckpoint(f"{where} has {read} bytes; it was copied with {wanted.bytes}")
            file.write(chunk)
            state.update(chunk)
            read += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    if state.hexdigest() != wanted.xxh3_128:
        raise DamagedCheckpoint(f"{where} has the digest {state.hexdigest()}; it was copied with {wanted.xxh3_128}")


def _read_table(store: Store, step: int) -> dict[str, Copied]:
    where = f"{store.address}/{_folder(step)}/{COPIED}"
    try:
        table = json.loads(store.read(f"{_folder(step)}/{COPIED}"))
        files = {str(name): Copied(int(one["bytes"]), str(one["xxh3_128"])) for name, one in table["files"].items()}
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{where} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{where} does not hold what it should ({error!r})") from error
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise DamagedCheckpoint(f"{where} names a file outside of the step: {name!r}")
    if not set(LAST) <= files.keys():
        raise DamagedCheckpoint(f"{where} does not name {' and '.join(LAST)}")
    return files


def _table(files: dict[str, Copied]) -> bytes:
    table = {name: one._asdict() for name, one in sorted(files.items())}
    return json.dumps({"format": FORMAT, "files": table}, indent=1).encode()


def _copied(data: bytes) -> Copied:
    return Copied(len(data), xxhash.xxh3_128_hexdigest(data))


def _folder(step: int) -> str:
    return f"{CHECKPOINTS}/{step}"
