"""From a sealed memory slot to its part of a durable step: shards become files, their digests checked on the way.

No JAX and no tensorstore: an uncompressed chunk of a zarr array is bytes of the shard as they lie in the slot. A file
that the step before has is shared with it (`sharing.py`). Nothing holds the slot, which may be written over at any
moment: then a digest does not fit, and the attempt has failed. Read next: `finalise.py`, which makes all hosts' parts a
step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxscale.checkpoint.boxes import lengths, volume
from jaxscale.checkpoint.layout import STATE_ITEM
from jaxscale.checkpoint.manifest import FileEntry, StoredShard
from jaxscale.checkpoint.room import Room, room
from jaxscale.checkpoint.sharing import BLOCK_BYTES, Before, blocks, step_before
from jaxscale.checkpoint.slot import SlotError, read_slot
from jaxscale.checkpoint.slot_file import CHUNK_BYTES, chunks, open_for_reading, read_into, write_all
from jaxscale.checkpoint.slot_format import Shard, SlotTable, digest_of
from jaxscale.checkpoint.written import Part, array_folder, merged, part_to_json, process_file
from jaxscale.checkpoint.zarr_files import chunk_file
from jaxscale.track import lines

THREADS = 4
"""Most of the time is spent waiting for the disk."""


def persist(slots: Iterable[Path], job: str, epoch: int, step: int, folder: Path) -> int:
    """Writes what one of the slots holds of a step below the step's `folder`, and says so in a file there.

    The folder has to be there, made for this epoch (`room.make_room`). Returns the bytes written; they are on the disk
    then. Raises SlotError where no slot holds the step, or it was written over meanwhile, and OSError.
    """
    reasons = []
    for path in slots:
        try:
            table = read_slot(path, job)
        except SlotError as error:
            reasons.append(str(error))
            continue
        if (table.epoch, table.step) == (epoch, step):
            with room(folder, epoch) as here:
                return _persist(path, table, here)
        reasons.append(f"{path.name} holds step {table.step} of epoch {table.epoch}")
    raise SlotError(f"step {step} of epoch {epoch} is in no slot: {'; '.join(reasons) or 'there are none'}")


def _persist(path: Path, table: SlotTable, folder: Room) -> int:
    stop, before = threading.Event(), step_before(folder.path.parent, table.step)
    source = open_for_reading(path)
    try:
        with ThreadPoolExecutor(THREADS, "persist") as pool:
            shards = [shard for shard in table.shards if volume(shard.box)]
            copies = [pool.submit(_Copy(source, path, shard, folder, before, stop).run) for shard in shards]
            try:
                part = merged([copy.result() for copy in copies])
            finally:
                stop.set()  # one has failed, and with it all
    finally:
        os.close(source)
    folder.sync()
    folder.say(process_file(table.rank), part_to_json(part) | {"table": _said(table)})
    return sum(entry.nbytes for entry in part.files.values())


def _said(table: SlotTable) -> dict[str, Any]:
    """What the one who makes the step of it must know of the state."""
    return {
        "epoch": table.epoch,
        "step": table.step,
        "arrays": {path: [list(info.shape), info.dtype] for path, info in table.arrays.items()},
        "record": lines.mark(table.record),
    }


@dataclass
class _Copy:
    """One shard's way from the slot at `path`, open as `source`, into files of the folder."""

    source: int
    path: Path
    shard: Shard
    folder: Room
    before: Before
    stop: threading.Event

    def run(self) -> Part:
        """Returns what was written. Raises SlotError, and OSError."""
        shard, at = self.shard, self.shard.offset
        stored, files = [], {}
        digest = xxhash.xxh3_128()
        boxes = blocks(shard.box, shard.nbytes)
        for box in boxes:
            if self.stop.is_set():
                break
            size = shard.nbytes // len(boxes)
            name = f"{STATE_ITEM}/{array_folder(shard.path)}/{chunk_file(shard.path, box, lengths(box))}"
            if len(boxes) == 1 and self.before.linked(name, FileEntry(size, shard.digest), *self.folder.place(name)):
                entry = FileEntry(size, shard.digest)
            else:
                entry = self._block(name, at, size, digest)
                if at + size == shard.offset + shard.nbytes:
                    self._check(digest.hexdigest())
            stored.append(StoredShard(box, size, entry.digest, name, 0))
            files[name] = entry
            at += size
        return Part({shard.path: tuple(stored)}, files)

    def _block(self, name: str, at: int, size: int, whole: xxhash.xxh3_128) -> FileEntry:
        """A file with that range of the slot; `whole` takes it in."""
        if size <= 2 * BLOCK_BYTES:
            data = np.empty(size, np.uint8)
            self._read(data, at)
            whole.update(data)
            entry = FileEntry(size, digest_of(data))
            if not self.before.linked(name, entry, *self.folder.place(name)):
                with self.folder.created(name) as file:
                    write_all(file, data)
            return entry
        digest, buffer = xxhash.xxh3_128(), np.empty(CHUNK_BYTES, np.uint8)
        with self.folder.created(name) as file:
            for begin, end in chunks(at, at + size):
                part = buffer[: end - begin]
                self._read(part, begin)
                digest.update(part)
                whole.update(part)
                write_all(file, part)
        return FileEntry(size, digest.hexdigest())

    def _read(self, data: np.ndarray[Any, Any], at: int) -> None:
        if read_into(self.source, data, at) != len(data):
            raise SlotError(f"{self.path}: {self.shard.name} is cut short")

    def _check(self, digest: str) -> None:
        if digest != self.shard.digest:
            raise SlotError(f"{self.path}: {self.shard.name} is damaged or was written over while it was read")
