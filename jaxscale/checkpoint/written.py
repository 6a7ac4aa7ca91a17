"""What a process has written of a step: its files are read back and compared with the digests that its shards had.

What went wrong between device and disk is so found before the step counts. Read next: `manifest.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from jaxscale.checkpoint.boxes import Box, text, volume
from jaxscale.checkpoint.manifest import DamagedCheckpoint, FileEntry, StoredShard

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Part:
    """What one process has written of a step."""

    shards: Mapping[str, tuple[StoredShard, ...]]
    files: Mapping[str, FileEntry]


def read_back(folder: Path, item: str, wanted: Mapping[tuple[str, Box], str], itemsize: Mapping[str, int]) -> Part:
    """Reads every file that holds one of the shards, below `folder/item`. Pure but for reading.

    `wanted`: (path, box) -> digest. Raises DamagedCheckpoint where a file is not there, is laid out otherwise than
    expected, or holds other bytes than the state had.
    """
    shards: dict[str, list[StoredShard]] = {}
    files = {}
    layouts: dict[str, _ArrayLayout] = {}
    for (path, box), digest in wanted.items():
        if path not in layouts:
            layouts[path] = _ArrayLayout.read(folder / item / array_folder(path))
        file = layouts[path].file_of(box)
        name = f"{item}/{array_folder(path)}/{file}"
        nbytes = volume(box) * itemsize[path]
        found, entry = file_digests(folder / name, nbytes)
        if found != digest:
            raise DamagedCheckpoint(f"{folder / name} holds other bytes than {path} {text(box)} had in memory")
        shards.setdefault(path, []).append(StoredShard(box, nbytes, digest, name, 0))
        files[name] = entry
    return Part({path: tuple(found) for path, found in shards.items()}, files)


def array_folder(path: str) -> str:
    """Where Orbax keeps an array of the state, below the state's folder."""
    return path.replace("/", ".")


def file_digests(path: Path, first: int) -> tuple[str, FileEntry]:
    """Digest of the first bytes of a file, and size and digest of all of it. Raises DamagedCheckpoint."""
    try:
        with open(path, "rb", buffering=0) as file:
            digest, done, of_first = xxhash.xxh3_128(), 0, None if first else xxhash.xxh3_128_hexdigest(b"")
            while data := file.read(min(CHUNK_BYTES, first - done) if done < first else CHUNK_BYTES):
                digest.update(data)
                done += len(data)
                if done == first:
                    of_first = digest.hexdigest()
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from error
    if of_first is None:
        raise DamagedCheckpoint(f"{path} has {done} bytes, fewer than the {first} of its shard")
    return of_first, FileEntry(done, digest.hexdigest())


def part_to_json(part: Part) -> dict[str, Any]:
    """A part as plain values, for the process that seals."""
    return {
        "shards": {
            path: [[s.box, s.nbytes, s.digest, s.file, s.offset] for s in found] for path, found in part.shards.items()
        },
        "files": {name: [entry.nbytes, entry.digest] for name, entry in part.files.items()},
    }


def part_from_json(value: Any) -> Part:
    """The part of `part_to_json`. Raises KeyError, TypeError or ValueError."""
    shards = {
        path: tuple(
            StoredShard(tuple((int(a), int(b)) for a, b in box), int(nbytes), str(digest), str(file), int(offset))
            for box, nbytes, digest, file, offset in found
        )
        for path, found in value["shards"].items()
    }
    return Part(shards, {name: FileEntry(int(size), str(digest)) for name, (size, digest) in value["files"].items()})


def merged(parts: Sequence[Part]) -> Part:
    """All parts as one."""
    shards: dict[str, tuple[StoredShard, ...]] = {}
    files: dict[str, FileEntry] = {}
    for part in parts:
        files |= part.files
        for path, found in part.shards.items():
            shards[path] = shards.get(path, ()) + found
    return Part(shards, files)


@dataclass(frozen=True)
class _ArrayLayout:
    """How the chunks of one array are named: zarr version 3, one uncompressed chunk a file."""

    chunk: tuple[int, ...]
    where: Path

    @classmethod
    def read(cls, folder: Path) -> _ArrayLayout:
        try:
            raw = json.loads((folder / "zarr.json").read_bytes())
            chunk = tuple(map(int, raw["chunk_grid"]["configuration"]["chunk_shape"]))
            codecs = raw["codecs"]
            if codecs[0]["name"] == "sharding_indexed":
                inner = codecs[0]["configuration"]
                if tuple(inner["chunk_shape"]) != chunk or inner.get("index_location", "end") != "end":
                    raise ValueError("its chunks lie in pieces")
                codecs = inner["codecs"]
            if [codec["name"] for codec in codecs] != ["bytes"]:
                raise ValueError(f"its codecs are {[codec['name'] for codec in codecs]}")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedCheckpoint(f"{folder / 'zarr.json'} is not as it was expected ({error})") from error
        return cls(chunk, folder)

    def file_of(self, box: Box) -> str:
        """Name of the file, below the array's folder, that holds just this box."""
        if any(start % size or stop - start != size for (start, stop), size in zip(box, self.chunk, strict=True)):
            raise DamagedCheckpoint(f"{self.where} has chunks of {list(self.chunk)}; {text(box)} is none of them")
        return "/".join(["c", *(str(start // size) for (start, _), size in zip(box, self.chunk, strict=True))])


def process_file(index: int) -> str:
    """Name of the file in a step's folder in which a process says what it wrote, until the step is sealed."""
    return f"process-{index}.json"


def remove_process_files(path: Path) -> None:
    for left in path.glob("process-*.json*"):
        os.unlink(left)
