"""Digests of a corpus's files by shard, a fixed number of bytes each, so that damage has a place.

Read next: `manifest.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

SHARD_BYTES = 1 << 20
_CHUNK = 1 << 22  # bytes read at once


class ShardDigests:
    """Takes the bytes of a file in order, and knows the digest of each shard."""

    def __init__(self, shard_bytes: int | None = None) -> None:
        """shard_bytes: of a shard; None: `SHARD_BYTES`."""
        self._size = shard_bytes or SHARD_BYTES
        self._done: list[str] = []
        self._open, self._count, self.nbytes = xxhash.xxh3_128(), 0, 0

    def update(self, data: Any) -> None:
        """data: anything with a buffer."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self.nbytes += len(view)
        while len(view):
            part = view[: self._size - self._count]
            self._open.update(part)
            self._count += len(part)
            view = view[len(part) :]
            if self._count == self._size:
                self._done.append(self._open.hexdigest())
                self._open, self._count = xxhash.xxh3_128(), 0

    def digests(self) -> list[str]:
        """xxh3_128 of each shard in hex; the last one may be shorter."""
        return [*self._done, *([self._open.hexdigest()] if self._count else [])]

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return {"size": self.nbytes, "shards": self.digests()}


def digest_file(path: Path, shard_bytes: int | None = None) -> ShardDigests:
    """Reads a file once. Raises OSError."""
    digests = ShardDigests(shard_bytes)
    for part in chunks(path):
        digests.update(part)
    return digests


def chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes in order; none where there is no file."""
    if path.exists():
        with open(path, "rb") as file:
            while part := file.read(_CHUNK):
                yield part


@dataclass(frozen=True)
class DamagedShard:
    """A stretch of a file that is not what was built."""

    file: str
    number: int
    """From 0; -1 when the file is missing or cannot be read."""
    start: int
    stop: int
    """Bytes of the file."""
    message: str


def damaged_shards(folder: Path, files: Mapping[str, Mapping[str, Any]], shard_bytes: int) -> list[DamagedShard]:
    """Every shard that differs from `files`: name -> what `ShardDigests.facts` gave. Reads everything once."""
    found: list[DamagedShard] = []
    for name, facts in files.items():
        size, wanted = int(facts["size"]), list(facts["shards"])
        try:
            if not (folder / name).is_file():
                raise FileNotFoundError(2, "it is not there")
            here = digest_file(folder / name, shard_bytes)
        except OSError as error:
            found.append(DamagedShard(name, -1, 0, size, f"{name}: {error.strerror or error}"))
            continue
        found += _differences(name, size, shard_bytes, wanted, here)
    return found


def _differences(
    name: str, size: int, shard_bytes: int, wanted: Sequence[str], found_there: ShardDigests
) -> list[DamagedShard]:
    found: list[DamagedShard] = []
    here, nbytes = found_there.digests(), found_there.nbytes
    for number in range(max(len(wanted), len(here))):
        start, stop = number * shard_bytes, min((number + 1) * shard_bytes, size)
        if number >= len(wanted):
            message = f"{name}: {nbytes - size} bytes after the end"
            found.append(DamagedShard(name, number, start, nbytes, message))
            break
        if number >= len(here):
            message = f"{name}, shard {number} (bytes {start}-{stop}): the file ends at {nbytes} bytes"
        elif here[number] != wanted[number]:
            message = (
                f"{name}, shard {number} (bytes {start}-{stop}): digest {here[number]}, built was {wanted[number]}"
            )
        else:
            continue
        found.append(DamagedShard(name, number, start, stop, message))
    return found
