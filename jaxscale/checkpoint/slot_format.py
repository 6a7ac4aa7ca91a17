"""What a memory slot looks like: the header's bytes, the table that describes the data, and how both are checked.

    0             header, HEADER_BYTES: magic, version, WRITING or SEALED, job, epoch, step, sizes, digests; zeros after
    HEADER_BYTES  data: each shard's bytes in C order, at a multiple of ALIGNMENT
    table_offset  table: JSON with the host, all arrays of the state, the shards held here, and the step's record

A slot comes from a process that may have died while writing, or over a network: nothing is believed before it has been
checked. Bytes in and out only; files are in `slot.py`, which is what to read next.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

from jaxscale.checkpoint.boxes import Box, fits, text, volume
from jaxscale.track import lines

MAGIC = b"\x93jaxscale-slot\r\n"
VERSION = 1
WRITING, SEALED = 0x9B1D_62E4, 0x64E2_9D1B  # all bits differ: no flipped bit turns one into the other
HEADER_BYTES = 4096
ALIGNMENT = 64
LARGEST = 1 << 62
MOST_DIMS = 64

_FIELDS = struct.Struct("<16sII64sQQQQQ16s")
"""Magic, version, state, job, epoch, step, bytes of the file, offset and bytes of the table, digest of the table."""
STATE_AT = 20
_STATE = struct.Struct("<I")
_DIGEST = 16
_HEX = re.compile(r"[0-9a-f]{32}")


class SlotError(RuntimeError):
    """A slot that cannot be used, or a shard of it; says which file and why."""


@dataclass(frozen=True)
class ArrayInfo:
    """An array of the state, as a whole."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class Shard:
    """A part of an array that a slot holds, and where."""

    path: str
    box: Box
    offset: int
    nbytes: int
    digest: str
    """xxh3_128 of the bytes, in hex; empty while the slot is being written."""

    @property
    def name(self) -> str:
        return f"{self.path} {text(self.box)}"


@dataclass(frozen=True)
class SlotTable:
    """All that a sealed slot says about itself."""

    job: str
    epoch: int
    step: int
    host: str
    """Who wrote it: a copy at another host still carries the owner's name."""
    rank: int
    arrays: Mapping[str, ArrayInfo]
    """All arrays of the state, held here or not."""
    shards: tuple[Shard, ...]
    record: Mapping[str, Any]
    """The fields of the step's `Record`; equal on all hosts."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True)
class Header:
    job: str
    epoch: int
    step: int
    file_bytes: int
    table_offset: int
    table_bytes: int
    table_digest: bytes


@lru_cache(maxsize=64)
def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a JAX dtype's name, bfloat16 and its like included. Raises SlotError."""
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.name != name or dtype.kind not in "biufcV" or dtype.itemsize == 0:
        raise SlotError(f"{name!r} is no dtype that an array of a state can have")
    return dtype


def digest_of(data: Any) -> str:
    """xxh3_128 of a buffer, in hex. Lets other threads run meanwhile where the buffer is large."""
    return xxhash.xxh3_128(data).hexdigest()


def encode_header(header: Header) -> bytes:
    """The bytes of a sealed slot's header. Raises SlotError for a job id that does not fit."""
    job = header.job.encode()
    if not 0 < len(job) <= 64 or b"\0" in job:
        raise SlotError(f"the job id {header.job!r} must be 1 to 64 bytes, and is {len(job)}")
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        SEALED,
        job,
        header.epoch,
        header.step,
        header.file_bytes,
        header.table_offset,
        header.table_bytes,
        header.table_digest,
    )
    return (fields + xxhash.xxh3_128(fields).digest()).ljust(HEADER_BYTES, b"\0")


def as_writing(header: bytes) -> bytes:
    """The same header, of a slot that is being written."""
    return header[:STATE_AT] + _STATE.pack(WRITING) + header[STATE_AT + _STATE.size :]


def decode_header(data: bytes, path: Path, job: str, file_bytes: int) -> Header:
    """The header of a sealed slot of this job in a file of this size. Raises SlotError with the reason."""
    if file_bytes == 0:
        raise SlotError(f"{path} is empty: its writer died before it had allocated it")
    if len(data) < HEADER_BYTES:
        raise SlotError(f"{path} is cut short: it has {file_bytes} bytes, and a slot's header alone has {HEADER_BYTES}")
    if not any(data[:HEADER_BYTES]):
        raise SlotError(f"{path} holds nothing yet: memory was allocated, and no snapshot written")
    magic, version, state, raw_job, *_ = fields = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise SlotError(f"{path} is not a memory slot: it begins with {bytes(data[:16])!r}; remove it")
    if version != VERSION:
        raise SlotError(f"{path} has slot format {version}, this version of jaxscale reads {VERSION}; remove it")
    if state == WRITING:
        raise SlotError(f"{path} is being written, or its writer died while writing")
    if state != SEALED or xxhash.xxh3_128(data[: _FIELDS.size]).digest() != data[_FIELDS.size :][:_DIGEST]:
        raise SlotError(f"{path} has a torn or damaged header: its digest does not fit")
    found = raw_job.rstrip(b"\0").decode(errors="replace")
    if found != job:
        raise SlotError(f"{path} belongs to job {found}, not to {job}; it was left behind by another run")
    header = Header(found, *fields[4:])
    if header.file_bytes != file_bytes:
        word = "cut short" if file_bytes < header.file_bytes else "too long"
        raise SlotError(f"{path} is {word}: it has {file_bytes} bytes and was sealed with {header.file_bytes}")
    if not HEADER_BYTES <= header.table_offset <= header.table_offset + header.table_bytes <= file_bytes:
        raise SlotError(
            f"{path} says that its table lies at {header.table_offset} and has {header.table_bytes} bytes, "
            f"in a file of {file_bytes}"
        )
    return header


def table_to_json(table: SlotTable) -> dict[str, Any]:
    """A table as plain values, for a file or a message. Raises ValueError for a record that JSON cannot hold."""
    return {
        "job": table.job,
        "epoch": table.epoch,
        "step": table.step,
        "host": table.host,
        "rank": table.rank,
        "arrays": {path: [list(info.shape), info.dtype] for path, info in table.arrays.items()},
        "shards": [[s.path, [list(pair) for pair in s.box], s.offset, s.nbytes, s.digest] for s in table.shards],
        "record": lines.mark(table.record),
    }


def table_from_json(value: Any) -> SlotTable:
    """The table of `table_to_json`, every field checked. Raises SlotError with the first thing that is wrong."""
    if not isinstance(value, dict):
        raise SlotError(f"a table is an object, not a {type(value).__name__}")
    arrays = {}
    for path, info in _field(value, "arrays", dict).items():
        if not (isinstance(info, list) and len(info) == 2 and _is_counts(info[0]) and isinstance(info[1], str)):
            raise SlotError(f"array {path!r} has {str(info)[:80]} where [shape, dtype] belongs")
        arrays[path] = ArrayInfo(tuple(info[0]), info[1])
        if len(info[0]) > MOST_DIMS or math.prod(info[0]) * arrays[path].itemsize > LARGEST:
            raise SlotError(f"array {path!r} has the absurd shape {str(info[0])[:80]}")
    shards = tuple(_shard(item, arrays) for item in _field(value, "shards", list))
    try:
        record = lines.unmark(_field(value, "record", dict))
    except ValueError as error:
        raise SlotError(f"its record cannot be read: {error}") from error
    job, host = _field(value, "job", str), _field(value, "host", str)
    epoch, step, rank = (_field(value, name, int) for name in ("epoch", "step", "rank"))
    if not (job and host) or min(epoch, step, rank) < 0:
        raise SlotError(f"job {job!r}, host {host!r}, epoch {epoch}, step {step}, rank {rank} cannot all be true")
    return SlotTable(job, epoch, step, host, rank, arrays, shards, record)


def encode_table(table: SlotTable) -> bytes:
    return json.dumps(table_to_json(table), allow_nan=False, separators=(",", ":")).encode()


def decode_table(data: bytes, header: Header, path: Path) -> SlotTable:
    """The table of a sealed slot, checked against its header: names, and places in the file. Raises SlotError."""
    if xxhash.xxh3_128(data).digest() != header.table_digest:
        raise SlotError(f"{path} has a damaged table: its digest does not fit")
    try:
        table = table_from_json(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise SlotError(f"{path} has a table that is not JSON ({error})") from error
    except SlotError as error:
        raise SlotError(f"{path} has a table that makes no sense: {error}") from error
    if (table.job, table.epoch, table.step) != (header.job, header.epoch, header.step):
        raise SlotError(f"{path} has header and table of different snapshots")
    end = HEADER_BYTES
    for shard in sorted(table.shards, key=lambda shard: (shard.offset, shard.nbytes)):
        if shard.offset < HEADER_BYTES or shard.offset + shard.nbytes > header.table_offset:
            raise SlotError(
                f"{path}: {shard.name} would lie at {shard.offset} to {shard.offset + shard.nbytes}, outside of the "
                f"data at {HEADER_BYTES} to {header.table_offset}"
            )
        if shard.offset < end:
            raise SlotError(f"{path}: {shard.name} at {shard.offset} overlaps the shard before it, which ends at {end}")
        end = shard.offset + shard.nbytes
    return table


def _shard(item: Any, arrays: Mapping[str, ArrayInfo]) -> Shard:
    if not (isinstance(item, list) and len(item) == 5):
        raise SlotError(f"a shard is [path, box, offset, bytes, digest], not {str(item)[:80]}")
    path, raw_box, offset, nbytes, digest = item
    info = arrays.get(path) if isinstance(path, str) else None
    if info is None:
        raise SlotError(f"a shard of {str(path)[:80]!r}, which is no array of the state")
    if not (isinstance(raw_box, list) and all(_is_counts(pair) and len(pair) == 2 for pair in raw_box)):
        raise SlotError(f"a shard of {path} has the box {str(raw_box)[:80]}")
    box: Box = tuple((start, stop) for start, stop in raw_box)
    if not fits(box, info.shape):
        raise SlotError(f"a shard of {path} has the box {text(box)}, outside of the array's shape {list(info.shape)}")
    if not (_is_counts([offset, nbytes]) and offset % ALIGNMENT == 0):
        raise SlotError(f"{path} {text(box)} lies at {offset!r} with {nbytes!r} bytes")
    if nbytes != volume(box) * info.itemsize:
        raise SlotError(f"{path} {text(box)} has {nbytes} bytes; {info.dtype} needs {volume(box) * info.itemsize}")
    if not (isinstance(digest, str) and _HEX.fullmatch(digest)):
        raise SlotError(f"{path} {text(box)} has the digest {str(digest)[:80]!r}")
    return Shard(path, box, offset, nbytes, digest)


def _field(value: dict[str, Any], name: str, kind: type) -> Any:
    found = value.get(name)
    if type(found) is not kind:
        raise SlotError(f"its field {name!r} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= LARGEST for item in value)
