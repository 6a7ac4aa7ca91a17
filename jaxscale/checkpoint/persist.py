"""From a sealed memory slot to its part of a durable step: each shard becomes a file, its digest checked on the way.

No JAX and no tensorstore: an uncompressed chunk of a zarr array is the shard's bytes as they lie in the slot, so its
digest is the file's. Nothing holds the slot, which may be written over at any moment: then a digest does not fit, and
the attempt has failed. Read next: `finalise.py`, which makes all hosts' parts a step.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxscale.checkpoint.boxes import lengths, volume
from jaxscale.checkpoint.layout import STATE_ITEM
from jaxscale.checkpoint.manifest import FileEntry, StoredShard
from jaxscale.checkpoint.room import Room, room
from jaxscale.checkpoint.slot import SlotError, read_slot
from jaxscale.checkpoint.slot_file import CHUNK_BYTES, chunks, open_for_reading, read_into
from jaxscale.checkpoint.slot_format import Shard, SlotTable
from jaxscale.checkpoint.written import Part, array_folder, part_to_json, process_file
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
    shards: dict[str, tuple[StoredShard, ...]] = {}
    files = {}
    stop = threading.Event()
    source = open_for_reading(path)
    try:
        with ThreadPoolExecutor(THREADS, "persist") as pool:
            copies = []
            for shard in table.shards:
                if not volume(shard.box):
                    continue
                chunk = chunk_file(shard.path, shard.box, lengths(shard.box))
                name = f"{STATE_ITEM}/{array_folder(shard.path)}/{chunk}"
                stored = StoredShard(shard.box, shard.nbytes, shard.digest, name, 0)
                shards[shard.path] = (*shards.get(shard.path, ()), stored)
                files[name] = FileEntry(shard.nbytes, shard.digest)
                copies.append(pool.submit(_copy, source, path, shard, folder, name, stop))
            try:
                for copy in copies:
                    copy.result()
            finally:
                stop.set()  # one has failed, and with it all
    finally:
        os.close(source)
    folder.sync()
    folder.say(process_file(table.rank), part_to_json(Part(shards, files)) | {"table": _said(table)})
    return sum(entry.nbytes for entry in files.values())


def _said(table: SlotTable) -> dict[str, Any]:
    """What the one who makes the step of it must know of the state."""
    return {
        "epoch": table.epoch,
        "step": table.step,
        "arrays": {path: [list(info.shape), info.dtype] for path, info in table.arrays.items()},
        "record": lines.mark(table.record),
    }


def _copy(source: int, path: Path, shard: Shard, folder: Room, name: str, stop: threading.Event) -> None:
    """Copies a shard of the slot at `path`, open as `source`, into a file of the folder, unless it is to `stop`."""
    buffer = np.empty(min(CHUNK_BYTES, shard.nbytes), np.uint8)
    digest = xxhash.xxh3_128()
    if stop.is_set():
        return
    file = folder.create(name)
    try:
        for begin, end in chunks(shard.offset, shard.offset + shard.nbytes):
            part = buffer[: end - begin]
            if read_into(source, part, begin) != end - begin:
                raise SlotError(f"{path}: {shard.name} is cut short")
            digest.update(part)
            view = memoryview(part)
            while view:
                view = view[os.write(file, view) :]
        if digest.hexdigest() != shard.digest:
            raise SlotError(f"{path}: {shard.name} is damaged or was written over while it was read")
        os.fsync(file)
    finally:
        os.close(file)
