"""Reads the arrays of a durable step: only the files that this process's devices need, each verified, each once.

Not through Orbax, which checks no bytes (it reads these files all the same): a shard is one file, not compressed, with
its digest in the manifest. Read next: `assemble.py`, which puts the shards on the devices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.assemble import NoGoodCopy, assemble
from jaxscale.checkpoint.boxes import lengths
from jaxscale.checkpoint.by_slice import as_stored
from jaxscale.checkpoint.cover import Choice, Location, Source
from jaxscale.checkpoint.manifest import DamagedCheckpoint, Manifest
from jaxscale.checkpoint.slot import SlotError
from jaxscale.checkpoint.slot_file import open_for_reading, read_into
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

    def fetch(location: Location, source: Source) -> np.ndarray[Any, Any]:
        data = read_file(path / location.file, manifest, location.file)
        part = data[location.offset : location.offset + source.nbytes]
        return part.view(dtype_of(arrays[source.path].dtype)).reshape(lengths(source.box))

    try:
        return assemble(abstract, choice, fetch)
    except NoGoodCopy as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error


def read_file(path: Path, manifest: Manifest, name: str) -> np.ndarray[Any, Any]:
    """All bytes of a file of the step, verified. Raises SlotError naming the file."""
    entry = manifest.files[name]
    file = open_for_reading(path)

    try:
        size = os.fstat(file).st_size
        if size != entry.nbytes:
            raise SlotError(f"{path} has {size} bytes; it was written with {entry.nbytes}")
        data = np.empty(size, np.uint8)
        if read_into(file, data, 0) != size:
            raise SlotError(f"{path} was cut short while it was read")
    finally:
        os.close(file)
    if digest_of(data) != entry.digest:
        raise SlotError(f"{path} is damaged: its digest does not fit")
    return data
