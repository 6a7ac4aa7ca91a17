"""Where the hosts write their parts of a durable step: a folder of one epoch, that nobody of another one writes into.

A writer may hang in a storage that hangs, be given up, and go on long after its step was begun anew by a later epoch,
at the same path. So it holds the folder itself open and writes relative to it: once that folder is deleted no file can
be made in it, whatever lies at its path by then. Read next: `persist.py`, `finalise.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.slot_file import write_all

ROOM = "process-room.json"
"""Says of which epoch the folder is; gone when the step is sealed, like all that processes say of their parts."""


class OtherRoom(OSError):
    """The folder is not of this epoch."""


def make_room(path: Path, epoch: int) -> None:
    """Before hosts write: the step's folder is there, empty, of this epoch, marked as being saved. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        layout.delete_step(path)
    layout.begin(path)
    path.mkdir()
    layout.write_json(path / ROOM, {"epoch": epoch})


@contextlib.contextmanager
def room(path: Path, epoch: int) -> Iterator[Room]:
    """The folder of a step, held open. Raises OtherRoom, and OSError where there is none."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = Room(path, folder)
        found.check(epoch)
        yield found
    finally:
        os.close(folder)


class Room:
    """Files below one folder, by their names relative to it. Every method raises OSError."""

    def __init__(self, path: Path, folder: int) -> None:
        self._path, self._folder = path, folder
        self._made: set[str] = set()

    def check(self, epoch: int) -> None:
        """Raises OtherRoom where it was not made for this epoch."""
        try:
            file = os.open(ROOM, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder)
            with os.fdopen(file, "rb") as opened:
                found = json.load(opened)["epoch"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise OtherRoom(f"{self._path} was not made for epoch {epoch}: {ROOM} does not say so") from error
        if found != epoch:
            raise OtherRoom(f"{self._path} is of epoch {found}, not of {epoch}")

    @property
    def path(self) -> Path:
        """Where it was when it was opened."""
        return self._path

    def place(self, name: str) -> tuple[str, int]:
        """The name and the open folder, for a file that is not there yet, in folders that are made where missing."""
        parents = [str(parent) for parent in PurePosixPath(name).parents][-2::-1]  # without ".", the outermost first
        for parent in parents:
            if parent not in self._made:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parent, dir_fd=self._folder)
                self._made.add(parent)
        with contextlib.suppress(FileNotFoundError):  # never written over: it may be an older step's file as well
            os.unlink(name, dir_fd=self._folder)
        return name, self._folder

    @contextlib.contextmanager
    def created(self, name: str) -> Iterator[int]:
        """A new empty file, open for writing; its bytes are on the disk for good when this is left well."""
        place, folder = self.place(name)
        file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=folder)
        try:
            yield file
            os.fsync(file)
        finally:
            os.close(file)

    def sync(self) -> None:
        """Returns when the names of all files that were made are on the disk for good."""
        for name in (".", *sorted(self._made)):
            file = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._folder)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def say(self, name: str, value: Any) -> None:
        """Writes a JSON file so that it is there wholly or not at all."""
        partial = name + layout.PARTIAL
        with self.created(partial) as file:
            write_all(file, (json.dumps(value) + "\n").encode())
        os.rename(partial, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
