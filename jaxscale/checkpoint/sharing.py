"""Deltas: a file whose bytes the step before has already is not written again, but shared with it by a hard link.

What does not change from step to step (frozen layers, the bases of adapters, rows of tables that no batch asked for)
costs neither time nor room, and every step stays whole by itself: stock Orbax reads it, and any other may be deleted,
for the file system counts the links. A file is known by name, size and digest. No more than MOST steps share one, so
that damage to a disk block spoils no more than these, and of a file that never changes there are several copies among
the steps that are kept. Read next: `persist.py`, `durable.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.boxes import Box, lengths
from jaxscale.checkpoint.manifest import DamagedCheckpoint, FileEntry

MOST = 5
BLOCK_BYTES = 1 << 22
"""A shard of more than twice as many is stored in ranges of its first dim of about this size."""
SUFFIX = ".shared"


@dataclass(frozen=True)
class Before:
    """The files of an older step, to be shared with. An empty one has none."""

    path: Path | None = None
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def linked(self, name: str, entry: FileEntry, target: str, folder: int | None = None) -> bool:
        """Whether `target` (relative to the open `folder`, if one is given) now is this file of the older step."""
        if self.path is None or self.files.get(name) != entry or not entry.nbytes:
            return False
        source = self.path / name
        try:
            found = os.stat(source, follow_symlinks=False)
            if found.st_size != entry.nbytes or found.st_nlink >= MOST:
                return False
            os.link(source, target, dst_dir_fd=folder, follow_symlinks=False)
        except (OSError, NotImplementedError):  # deleted just now, or a file system without links
            return False
        return True


def step_before(folder: Path, step: int) -> Before:
    """The newest sealed step of a run before this one; an empty one where there is none that can be read."""
    for older in reversed([one for one in layout.list_steps(folder) if one < step]):
        path = layout.step_folder(folder, older)
        try:
            return Before(path, layout.read_manifest(path).files)
        except (DamagedCheckpoint, OSError):
            continue
    return Before()


def share(path: Path, files: Mapping[str, FileEntry]) -> int:
    """Replaces written files by those of the step before that have the same bytes. Returns the bytes that are so free.

    `files`: what was written below `path`, verified. Each is replaced by a rename, so it is there at any moment.
    """
    before, freed = step_before(path.parent, int(path.name)), 0
    for name, entry in files.items():
        target = f"{path / name}{SUFFIX}"
        if before.linked(name, entry, target):
            with contextlib.suppress(OSError):  # the file that was written is as good
                os.replace(target, path / name)
                freed += entry.nbytes
            with contextlib.suppress(FileNotFoundError):  # of two names of one file, rename leaves both
                os.unlink(target)
    return freed


def blocks(box: Box, nbytes: int) -> list[Box]:
    """Ranges of a box's first dim, all of one length that divides it, so that they are chunks of one grid. Pure."""
    if not box or nbytes <= 2 * BLOCK_BYTES:
        return [box]
    (start, stop), *rest = box
    rows = lengths(box)[0]
    most = max(1, BLOCK_BYTES * rows // nbytes)
    length = next(length for length in range(most, 0, -1) if rows % length == 0)
    if length * nbytes // rows < BLOCK_BYTES // 16:  # many small files are worse
        return [box]
    return [((first, first + length), *rest) for first in range(start, stop, length)]


def on_disk(folder: Path, steps: Iterable[int]) -> int:
    """Bytes of all files of these steps of a run, each file once, however many steps share it."""
    sizes = {}
    for step in steps:
        for place, _, names in os.walk(layout.step_folder(folder, step)):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # deleted just now
                    found = os.lstat(os.path.join(place, name))
                    sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())
