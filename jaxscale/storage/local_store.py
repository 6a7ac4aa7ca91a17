"""A folder as a store: on a disk, a mounted bucket, a network file system.

A file is written aside, synced and renamed. Conditional writes hold a lock on a file beside it while they look and
write, so they are conditional among the processes that share the lock: those of one machine, and of several where the
file system's locks reach so far. Read next: `s3_store.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxscale.storage.store import Chunks, Conflict, Versioned

PARTIAL = ".partial"
LOCK = ".lock"
MOST_NAMES = 5
"""One file has as many at most: damage to its blocks is damage to all of them."""


class LocalStore:
    """Makes its folders when something is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.address = str(self._folder)

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._folder / folder) if not _is_ours(name))
        except FileNotFoundError:
            return []

    def files(self, folder: str = "") -> dict[str, int]:
        top, found = self._folder / folder, {}
        for place, _, names in os.walk(top, onerror=_unless_missing):
            for name in names:
                path = Path(place, name)
                with contextlib.suppress(FileNotFoundError):  # deleted just now, or a link to nowhere
                    found_stat = path.stat()
                    if not _is_ours(name) and stat.S_ISREG(found_stat.st_mode):  # to read a pipe would block
                        found[path.relative_to(top).as_posix()] = found_stat.st_size
        return found

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        with open(self._folder / name, "rb") as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def read_versioned(self, name: str) -> Versioned:
        data = self.read(name)
        return Versioned(data, _version(data))

    def write(self, name: str, data: bytes) -> None:
        self._write(name, [data])

    def write_chunks(self, name: str, chunks: Chunks, size: int) -> None:  # noqa: ARG002 - the end says how long it is
        self._write(name, chunks())

    def copy(self, name: str, to: str, size: int) -> bool:
        source, path = self._folder / name, self._folder / to
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = source.stat(follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size or found.st_nlink >= MOST_NAMES:
                return False
            os.link(source, partial, follow_symlinks=False)
        except (OSError, NotImplementedError):  # gone, or a file system without hard links
            return False
        os.replace(partial, path)
        partial.unlink(missing_ok=True)  # of two names of one file, rename leaves both
        _sync_folder(path.parent)
        return True

    def create(self, name: str, data: bytes) -> str:
        with self._locked(name) as path:
            if path.exists():
                raise Conflict(f"{path} is there already")
            self._write(name, [data], alone=True)
        return _version(data)

    def replace(self, name: str, data: bytes, version: str) -> str:
        with self._locked(name) as path:
            try:
                found = _version(path.read_bytes())
            except FileNotFoundError:
                raise Conflict(f"{path} is gone") from None
            if found != version:
                raise Conflict(f"{path} was written by somebody else")
            self._write(name, [data], alone=True)
        return _version(data)

    def delete(self, name: str) -> None:
        path = self._folder / name
        path.unlink(missing_ok=True)
        for folder in path.parents:  # an object store has no empty folders either
            if folder == self._folder or not folder.is_relative_to(self._folder):
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def _write(self, name: str, chunks: Iterable[bytes], *, alone: bool = False) -> None:
        """`alone`: nobody else writes this file now, so what a kill leaves is written over by the next one."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}{'' if alone else '.' + secrets.token_hex(4)}{PARTIAL}")
        try:
            with open(partial, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[Path]:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path.with_name(f".{path.name}{LOCK}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield path
        finally:
            os.close(file)


def _version(data: bytes) -> str:
    """Owners write nothing twice: time and generation are in each of their records."""
    return hashlib.sha256(data).hexdigest()


def _is_ours(name: str) -> bool:
    return name.startswith(".") and name.endswith((PARTIAL, LOCK))


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync_folder(folder: Path) -> None:
    """A name in a folder is safe from a loss of power only once the folder is on the disk too."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
