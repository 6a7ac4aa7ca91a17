"""Memory slots as files: one snapshot of a host's shards in shared memory, written by one process, read by any.

No locks and no fsync: a slot counts only while its header says so, the header is written last, and whoever reads it
checks every digest. Files are read with `pread`, never mapped, so that a file that shrinks is an error and no signal;
the writer's file may be unlinked, but nobody else may resize it. The bytes are described in `slot_format.py`, the
system calls are in `slot_file.py`; read next: `cover.py`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from jaxscale.checkpoint.boxes import Box, fits, lengths, volume
from jaxscale.checkpoint.slot_file import (
    CHUNK_BYTES,
    allocate,
    chunks,
    open_for_reading,
    open_for_writing,
    read_into,
    round_up,
    write,
)
from jaxscale.checkpoint.slot_format import (
    ALIGNMENT,
    HEADER_BYTES,
    STATE_AT,
    ArrayInfo,
    Header,
    Shard,
    SlotError,
    SlotTable,
    as_writing,
    decode_header,
    decode_table,
    digest_of,
    dtype_of,
    encode_header,
    encode_table,
)

__all__ = [
    "HEADER_BYTES",
    "ArrayInfo",
    "OpenShards",
    "Shard",
    "SlotError",
    "SlotTable",
    "SlotWriter",
    "adopt",
    "begin_copy",
    "check_shard",
    "locate",
    "open_shards",
    "read_shard",
    "read_slot",
    "verify",
]

RECORD_BYTES = 1 << 16
"""Room for the record in a new file; a larger one makes the file grow."""
PAGE = mmap.PAGESIZE


class SlotWriter:
    """Writes snapshots of one layout into one file: `begin`, fill every `view`, `seal`; again and again.

    The file is made or resized, and its memory allocated and touched, when this is made; a file that has the right size
    already keeps its content until `begin`. One thread at a time, in the order above.
    """

    def __init__(
        self,
        path: Path,
        job: str,
        host: str,
        rank: int,
        arrays: Mapping[str, ArrayInfo],
        shards: Sequence[tuple[str, Box]],
    ) -> None:
        """`arrays`: all arrays of the state; `shards`: those to be held here. Raises SlotError where there is no room.

        Raises ValueError for a shard that is in no array.
        """
        self.path = path
        placed, end = _place(arrays, shards)
        self._table = SlotTable(job, 0, 0, host, rank, dict(arrays), placed, {})
        room = len(encode_table(self._table)) + 32 * len(placed) + RECORD_BYTES  # + the digests
        self._data_end = end
        self._size = round_up(end + room, PAGE)
        self._begun = False
        encode_header(Header(job, 0, 0, 0, 0, 0, b""))  # a job id that does not fit is an error now
        self._file = open_for_writing(path)
        try:
            if os.fstat(self._file).st_size != self._size:
                os.ftruncate(self._file, self._size)
            allocate(self._file, self._size, path)
            memory = mmap.mmap(self._file, end, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        except BaseException:
            os.close(self._file)
            raise
        self._bytes: np.ndarray[Any, Any] = np.frombuffer(memory, np.uint8)
        self._bytes[::PAGE] = self._bytes[::PAGE]  # maps every page now, and changes nothing

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is held here, in the order given; `view(i)` is where shard i goes."""
        return self._table.shards

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return self._table.nbytes

    def begin(self, epoch: int, step: int) -> None:
        """Declares the old content void. From here to `seal` no reader accepts the slot."""
        self._table = replace(self._table, epoch=epoch, step=step)
        header = as_writing(encode_header(Header(self._table.job, epoch, step, self._size, 0, 0, b"")))
        self._put_state(header)
        self._bytes[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
        self._begun = True

    def view(self, index: int) -> np.ndarray[Any, Any]:
        """The memory of shard `index` as a writable array of its shape and dtype. Not to be kept beyond `seal`."""
        shard = self._table.shards[index]
        dtype = dtype_of(self._table.arrays[shard.path].dtype)
        return self._bytes[shard.offset : shard.offset + shard.nbytes].view(dtype).reshape(lengths(shard.box))

    def seal(self, record: Mapping[str, Any]) -> SlotTable:
        """Digests the data, writes table and header, and returns the table: now the slot can be read.

        Computes on all the data, without holding up other threads. Raises SlotError where a table that outgrew the file
        finds no room, TypeError and ValueError for a record that JSON cannot hold; the slot then stays void.
        """
        if not self._begun:
            raise RuntimeError(f"{self.path}: seal() without begin(); the old content is still valid")
        shards = tuple(replace(s, digest=self._digest(s)) for s in self._table.shards)
        self._table = replace(self._table, shards=shards, record=dict(record))
        data = encode_table(self._table)
        self._write_table(data)
        header = Header(
            self._table.job,
            self._table.epoch,
            self._table.step,
            self._size,
            self._data_end,
            len(data),
            xxhash.xxh3_128(data).digest(),
        )
        self._write_header(encode_header(header))
        self._begun = False
        return self._table

    def close(self) -> None:
        """Lets go of the file, which stays. An unsealed slot stays void."""
        self._bytes = np.empty(0, np.uint8)  # the mapping ends with its last view
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _digest(self, shard: Shard) -> str:
        digest = xxhash.xxh3_128()
        for start, stop in chunks(shard.offset, shard.offset + shard.nbytes):
            digest.update(self._bytes[start:stop])
        return digest.hexdigest()

    def _write_table(self, data: bytes) -> None:
        needed = round_up(self._data_end + len(data), PAGE)
        if needed > self._size:
            allocate(self._file, needed, self.path)
            self._size = needed
        write(self._file, data, self._data_end)

    def _write_header(self, header: bytes) -> None:
        """All but the state, then the state: it alone makes the slot valid."""
        self._bytes[:HEADER_BYTES] = np.frombuffer(as_writing(header), np.uint8)
        self._put_state(header)

    def _put_state(self, header: bytes) -> None:
        self._bytes[STATE_AT : STATE_AT + 4].view(np.uint32)[0] = np.frombuffer(header, np.uint32, 1, STATE_AT)[0]


class OpenShards:
    """An open slot file: `read` gives its shards, `descriptor` serves `os.sendfile`. Close it, or use `with`."""

    def __init__(self, path: Path, table: SlotTable) -> None:
        """Raises SlotError where the file cannot be opened."""
        self.path, self.table = path, table
        self.descriptor = open_for_reading(path)

    def read(self, shard: Shard) -> np.ndarray[Any, Any]:
        """A copy of a shard of this slot, in fresh memory, verified. Raises SlotError naming path, box and file."""
        return _read(self.descriptor, self.path, shard, self.table.arrays[shard.path].dtype)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def open_shards(path: Path, table: SlotTable) -> OpenShards:
    """Opens a slot for reading the shards that its table lists. Raises SlotError."""
    return OpenShards(path, table)


def read_shard(path: Path, shard: Shard, dtype: str) -> np.ndarray[Any, Any]:
    """One shard of a file whose table is not at hand: a verified copy in fresh memory. Raises SlotError."""
    file = open_for_reading(path)
    try:
        return _read(file, path, shard, dtype)
    finally:
        os.close(file)


def read_slot(path: Path, job: str) -> SlotTable:
    """The table of a sealed slot of this job; reads header and table, not the data. Raises SlotError with the reason.

    The slot may be overwritten at any moment: only the digest of a shard that was read says what it is.
    """
    file = open_for_reading(path)
    try:
        return _read_table(file, os.pread(file, HEADER_BYTES, 0), path, job)
    finally:
        os.close(file)


def verify(path: Path, job: str) -> SlotTable:
    """As `read_slot`, and every shard's digest is checked. Raises SlotError naming the first shard that is damaged."""
    file = open_for_reading(path)
    try:
        return _verify(file, os.pread(file, HEADER_BYTES, 0), path, job)
    finally:
        os.close(file)


def check_shard(data: Any, shard: Shard, dtype: str, where: str) -> np.ndarray[Any, Any]:
    """The bytes of a shard as an array of its shape, not copied, once size and digest are found right.

    `where` names the file or host they came from. Raises SlotError.
    """
    flat = np.frombuffer(data, np.uint8)
    if flat.nbytes != shard.nbytes or volume(shard.box) * dtype_of(dtype).itemsize != shard.nbytes:
        raise SlotError(f"{where}: {shard.name} came with {flat.nbytes} bytes, and has {shard.nbytes}")
    if digest_of(flat) != shard.digest:
        raise SlotError(_damaged(shard, where))
    return flat.view(dtype_of(dtype)).reshape(lengths(shard.box))


def locate(table: SlotTable, path: str, box: Box) -> Shard:
    """The shard with this path and box: `offset` and `nbytes` say where its bytes lie in the file. Raises SlotError."""
    for shard in table.shards:
        if shard.path == path and shard.box == box:
            return shard
    raise SlotError(f"the slot of {table.host}, step {table.step}, does not hold {path} {box}")


def begin_copy(path: Path, file_bytes: int) -> int:
    """Prepares a file for a slot that is received whole, and returns its descriptor: close it.

    What it held is void from here on. Write the bytes from HEADER_BYTES on to it, keep the first HEADER_BYTES aside,
    and then call `adopt`. Raises SlotError where there is no room.
    """
    if file_bytes < HEADER_BYTES:
        raise SlotError(f"{path}: a slot of {file_bytes} bytes cannot be; its header alone has {HEADER_BYTES}")
    file = open_for_writing(path)
    try:
        size = os.fstat(file).st_size
        if size:
            write(file, bytes(min(size, HEADER_BYTES)), 0)
        if size != file_bytes:
            os.ftruncate(file, file_bytes)
        allocate(file, file_bytes, path)
    except BaseException:
        os.close(file)
        raise
    return file


def adopt(path: Path, header: bytes, job: str) -> SlotTable:
    """Ends a copy that `begin_copy` began: verifies everything, and then writes the header.

    Raises SlotError where anything is wrong; the copy stays void then.
    """
    if len(header) != HEADER_BYTES:
        raise SlotError(f"{path}: a header of {len(header)} bytes was received, it has {HEADER_BYTES}")
    file = open_for_writing(path)
    try:
        table = _verify(file, header, path, job)
        write(file, header, 0)
        return table
    finally:
        os.close(file)


def _place(arrays: Mapping[str, ArrayInfo], shards: Sequence[tuple[str, Box]]) -> tuple[tuple[Shard, ...], int]:
    """Where each shard goes in the file, and where the data ends."""
    placed, end = [], HEADER_BYTES
    for path, box in shards:
        info = arrays.get(path)
        if info is None or not fits(box, info.shape):
            raise ValueError(f"shard {path} {box} lies in no array of the state: {info}")
        nbytes = volume(box) * info.itemsize
        placed.append(Shard(path, box, end, nbytes, ""))
        end = round_up(end + nbytes, ALIGNMENT)
    return tuple(placed), end


def _read(file: int, path: Path, shard: Shard, dtype: str) -> np.ndarray[Any, Any]:
    data = np.empty(shard.nbytes, np.uint8)
    got = read_into(file, data, shard.offset)
    if got != shard.nbytes:
        raise SlotError(f"{path}: {shard.name} is cut short, {got} of its {shard.nbytes} bytes are there")
    return check_shard(data, shard, dtype, str(path))


def _read_table(file: int, header_bytes: bytes, path: Path, job: str) -> SlotTable:
    header = decode_header(header_bytes, path, job, os.fstat(file).st_size)
    data = np.empty(header.table_bytes, np.uint8)
    if read_into(file, data, header.table_offset) != header.table_bytes:
        raise SlotError(f"{path} was cut short while it was read")
    return decode_table(data.tobytes(), header, path)


def _verify(file: int, header_bytes: bytes, path: Path, job: str) -> SlotTable:
    table = _read_table(file, header_bytes, path, job)
    buffer = np.empty(min(CHUNK_BYTES, max((s.nbytes for s in table.shards), default=0)), np.uint8)
    for shard in table.shards:
        digest = xxhash.xxh3_128()
        for start, stop in chunks(shard.offset, shard.offset + shard.nbytes):
            got = read_into(file, buffer[: stop - start], start)
            digest.update(buffer[:got])
        if digest.hexdigest() != shard.digest:
            raise SlotError(_damaged(shard, str(path)))
    return table


def _damaged(shard: Shard, where: str) -> str:
    return f"{where}: {shard.name} is damaged, its digest does not fit"
