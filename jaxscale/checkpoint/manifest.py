"""The manifest of a durable step: every file with its size and digest, every array with its shards, and its own digest.

Written last (by `layout.seal`), read first. A step whose manifest is missing, unreadable or not whole does not exist.
Data in, data out; files are in `layout.py`. Read next: `load_files.py`, which believes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import xxhash

from jaxscale.checkpoint.boxes import Box, fits, text, volume
from jaxscale.checkpoint.slot_format import SlotError, dtype_of

FORMAT = 2
_HEX = re.compile(r"[0-9a-f]{32}")
LARGEST = 1 << 62

Arrays = dict[str, tuple[tuple[int, ...], str]]
"""Path of an array -> (shape, dtype name)."""


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that cannot be trusted: something of it is missing, cut short, changed or unreadable."""


@dataclass(frozen=True)
class FileEntry:
    """A file of a step."""

    nbytes: int
    digest: str
    """xxh3_128 of all its bytes, in hex."""


@dataclass(frozen=True)
class StoredShard:
    """A part of an array, and where its bytes lie: little-endian, C order, not compressed."""

    box: Box
    nbytes: int
    digest: str
    """xxh3_128 of its bytes as they were in the state, in hex."""
    file: str
    """Below the step's folder."""
    offset: int


@dataclass(frozen=True)
class Manifest:
    """What must be there for a step to be complete."""

    step: int
    files: Mapping[str, FileEntry]
    """Path below the step's folder -> size and digest."""
    arrays: Arrays
    shards: Mapping[str, tuple[StoredShard, ...]]
    """Path of an array -> shards that cover it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For people and tools: config hash, epoch, mesh that wrote it, data, versions."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.nbytes for entry in self.files.values())


def encode(manifest: Manifest) -> dict[str, Any]:
    """A manifest as plain values, with its digest."""
    value: dict[str, Any] = {
        **manifest.facts,
        "format": FORMAT,
        "step": manifest.step,
        "files": {name: [entry.nbytes, entry.digest] for name, entry in manifest.files.items()},
        "arrays": {
            path: {
                "shape": list(shape),
                "dtype": dtype,
                "shards": [
                    [[list(pair) for pair in s.box], s.nbytes, s.digest, s.file, s.offset]
                    for s in manifest.shards.get(path, ())
                ],
            }
            for path, (shape, dtype) in manifest.arrays.items()
        },
    }
    value = json.loads(json.dumps(value, allow_nan=False, default=dict))  # as it will be read: keys are text
    return {**value, "digest": digest_of_value(value)}


def decode(raw: Any, where: str) -> Manifest:
    """The manifest of `encode`, every field checked. `where` names it in messages. Raises DamagedCheckpoint."""
    if not isinstance(raw, dict):
        raise DamagedCheckpoint(f"{where} holds a {type(raw).__name__} where an object belongs")
    value = dict(raw)
    if (found := value.get("format")) != FORMAT:
        raise DamagedCheckpoint(
            f"{where} has checkpoint format {found!r}; this version reads format {FORMAT}; "
            "use the version of jaxscale that wrote it"
        )
    if value.pop("digest", None) != digest_of_value(value):
        raise DamagedCheckpoint(f"{where} is damaged: its digest does not fit")
    try:
        files = {
            _name(name): FileEntry(_count(size), _digest(digest)) for name, (size, digest) in _items(value, "files")
        }
        arrays: Arrays = {}
        shards = {}
        for path, array in _items(value, "arrays"):
            shape, dtype = tuple(_count(size) for size in array["shape"]), array["dtype"]
            if not isinstance(dtype, str) or math.prod(shape) * dtype_of(dtype).itemsize > LARGEST:
                raise ValueError(f"array {path} is {dtype!r}{list(shape)}")
            arrays[path] = shape, dtype
            shards[path] = tuple(_shard(item, path, arrays[path], files) for item in array["shards"])
        step = _count(value["step"])
    except (KeyError, TypeError, ValueError, AttributeError, SlotError) as error:
        raise DamagedCheckpoint(f"{where} does not hold what a manifest holds ({error!r})") from error
    facts = {name: fact for name, fact in value.items() if name not in ("format", "step", "files", "arrays")}
    return Manifest(step, files, arrays, shards, facts)


def digest_of_value(value: Any) -> str:
    """xxh3_128, in hex, of a JSON value, whatever the order of its keys and the spaces between them."""
    data = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(data.encode())


def _shard(item: Any, path: str, array: tuple[tuple[int, ...], str], files: Mapping[str, FileEntry]) -> StoredShard:
    raw_box, nbytes, digest, file, offset = item
    box: Box = tuple((_count(start), _count(stop)) for start, stop in raw_box)
    shape, dtype = array
    shard = StoredShard(box, _count(nbytes), _digest(digest), _name(file), _count(offset))
    if not fits(box, shape) or volume(box) * dtype_of(dtype).itemsize != nbytes:
        raise ValueError(f"{path} {text(box)} of {nbytes} bytes is no shard of {dtype}{list(shape)}")
    if file not in files or shard.offset + nbytes > files[file].nbytes:
        raise ValueError(f"{path} {text(box)} would lie at {shard.offset} of {file}, which has no such place")
    return shard


def _items(value: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    return list(value[name].items())


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{value!r} is no count")
    return value


def _digest(value: Any) -> str:
    if not (isinstance(value, str) and _HEX.fullmatch(value)):
        raise ValueError(f"{str(value)[:80]!r} is no digest")
    return value


def _name(value: Any) -> str:
    """A path below the step's folder: nothing else may be read because a file says so."""
    if (
        not isinstance(value, str)
        or not value
        or PurePosixPath(value).is_absolute()
        or ".." in PurePosixPath(value).parts
    ):
        raise ValueError(f"{str(value)[:80]!r} is no path below a step's folder")
    return value
