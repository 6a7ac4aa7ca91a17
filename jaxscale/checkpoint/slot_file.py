"""Files in shared memory: allocated before they are used, read without mapping them. Used by `slot.py`."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Buffer, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.checkpoint.slot_format import SlotError

CHUNK_BYTES = 1 << 22


def open_for_reading(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place must not block
    except FileNotFoundError as error:
        raise SlotError(f"{path} is not there") from error
    except OSError as error:
        raise SlotError(f"{path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise SlotError(f"{path} is not a regular file; remove it")
    return file


def open_for_writing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SlotError(f"the memory slot {path} cannot be opened for writing: {error.strerror}") from error


def allocate(file: int, size: int, path: Path) -> None:
    """Makes sure that all of the file's memory is there: a write into a mapping could only be told by a signal."""
    before = os.fstat(file).st_size
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0 if before == size else before)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
            raise SlotError(f"the memory slot {path} cannot be allocated: {error.strerror}") from error
        space = os.statvfs(path.parent)
        raise SlotError(
            f"no room for the memory slot {path}: it needs {size} bytes ({size / 1e6:.1f} MB), and "
            f"{space.f_bavail * space.f_frsize} of {space.f_blocks * space.f_frsize} bytes of its filesystem are free; "
            f"make {path.parent} larger (for /dev/shm: mount -o remount,size=..., or --shm-size of a container), "
            "or keep fewer generations or replicas"
        ) from error


def write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def write_all(file: int, data: Buffer) -> None:
    """Writes bytes at the file's own position."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def read_into(file: int, buffer: np.ndarray[Any, Any], offset: int) -> int:
    """Fills a buffer of bytes from the file; returns how many there were."""
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        got = os.preadv(file, [view[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, CHUNK_BYTES):
        yield at, min(at + CHUNK_BYTES, stop)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
