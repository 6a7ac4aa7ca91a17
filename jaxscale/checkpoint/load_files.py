"""Reads the arrays of a durable step: only the files that this process's devices need, each verified, each once.

Not through Orbax, which checks no bytes (it reads these files all the same): a shard is one file, not compressed, with
its digest in the manifest. Read next: `assemble.py`, which puts the shards on the devices.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxscale import tree
from jaxscale.checkpoint.assemble import NoGoodCopy, Piece, assemble
from jaxscale.checkpoint.boxes import Box, lengths
from jaxscale.checkpoint.by_slice import as_stored
from jaxscale.checkpoint.cover import Choice, Location, Source
from jaxscale.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest
from jaxscale.checkpoint.slot import SlotError
from jaxscale.checkpoint.slot_file import CHUNK_BYTES, open_for_reading, read_into
from jaxscale.checkpoint.slot_format import ArrayInfo, digest_of, dtype_of

DURABLE = "durable"


def load(path: Path, manifest: Manifest, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that `abstract` names, which the step must have; all or some of them. Meets no other process.

    `abstract`: nested dict of `jax.ShapeDtypeStruct` with shardings, on any mesh. Returns `jax.Array`s of exactly these
    shapes, dtypes and shardings. Raises DamagedCheckpoint naming files and shards.
    """
    names = tree.flatten(as_stored(abstract, manifest.arrays)).keys()
    arrays = {name: ArrayInfo(*manifest.arrays[name]) for name in names}
    shards = tuple(
        Source(name, s.box, s.nbytes, s.digest, (Location(DURABLE, s.file, s.offset),))
        for name in names
        for s in manifest.shards[name]
    )
    choice = Choice(manifest.step, 0, str(path), {}, arrays, shards)

    def fetch(location: Location, source: Source) -> np.ndarray[Any, Any] | Iterable[Piece]:
        entry, dtype = manifest.files[location.file], dtype_of(arrays[source.path].dtype)
        if source.box and source.nbytes > CHUNK_BYTES and (location.offset, source.nbytes) == (0, entry.nbytes):
            return read_pieces(path / location.file, entry, source.box, dtype)
        data = read_file(path / location.file, entry)
        return data[location.offset : location.offset + source.nbytes].view(dtype).reshape(lengths(source.box))

    try:
        return assemble(abstract, choice, fetch)
    except NoGoodCopy as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error


def read_pieces(path: Path, entry: FileEntry, box: Box, dtype: np.dtype[Any]) -> Iterator[Piece]:
    """All of a file that holds a shard and nothing else, a range of its first dim at a time, in one buffer.

    Verified when the last one was taken. Raises SlotError naming the file.
    """
    (first, stop), *rest = box
    row = entry.nbytes // (stop - first)
    rows = max(1, CHUNK_BYTES // row)
    digest = xxhash.xxh3_128()
    with _opened(path, entry) as file:
        buffer = np.empty(min(rows, stop - first) * row, np.uint8)
        for start in range(first, stop, rows):
            end = min(start + rows, stop)
            part = buffer[: (end - start) * row]
            if read_into(file, part, (start - first) * row) != len(part):
                raise SlotError(f"{path} was cut short while it was read")
            digest.update(part)
            piece = ((start, end), *rest)
            yield piece, part.view(dtype).reshape(lengths(piece))
    _check(path, entry, digest.hexdigest())


def read_file(path: Path, entry: FileEntry) -> np.ndarray[Any, Any]:
    """All bytes of a file of the step, verified. Raises SlotError naming the file."""
    with _opened(path, entry) as file:
        data = np.empty(entry.nbytes, np.uint8)
        if read_into(file, data, 0) != len(data):
            raise SlotError(f"{path} was cut short while it was read")
    _check(path, entry, digest_of(data))
    return data


@contextlib.contextmanager
def _opened(path: Path, entry: FileEntry) -> Iterator[int]:
    file = open_for_reading(path)
    try:
        size = os.fstat(file).st_size
        if size != entry.nbytes:
            raise SlotError(f"{path} has {size} bytes; it was written with {entry.nbytes}")
        yield file
    finally:
        os.close(file)


def _check(path: Path, entry: FileEntry, digest: str) -> None:
    if digest != entry.digest:
        raise SlotError(f"{path} is damaged: its digest does not fit")
