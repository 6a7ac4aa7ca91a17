"""A set of 64-bit keys in a scratch file, each with the number of the first document that had it.

An open-addressing table with linear probing, a whole batch of keys at once. It is mapped into memory from a file that
is deleted at once: the kernel keeps of it what fits, and the process lets go of its pages every so often. Two different
keys are told apart by all 64 bits: of n documents about n^2 / 2^65 are wrongly taken for seen, of 10^9 one with a
chance of 3 %. Read next: `writing.py`.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

_FIRST_SLOTS = 1 << 16
_FULL = 0.6  # share of slots in use from which the table is doubled
_COPIED = 1 << 15  # slots looked at together when it is
_RESIDENT = 1 << 26  # bytes of pages that may be in memory
_AROUND = 1 << 16  # bytes that the kernel brings in with any one of them
_SLOT = np.dtype([("key", "<u8"), ("first", "<i8")])


class Seen:
    """Keys, evenly spread over all 64-bit numbers, and who had them first."""

    def __init__(self, path: Path, slots: int = _FIRST_SLOTS) -> None:
        """path: of the scratch file; there is none by that name afterwards. slots: to begin with, a power of two."""
        self._path = path
        self._used = 0
        self._table, self._map = _scratch(path, slots)

    def __len__(self) -> int:
        return self._used

    def claim(self, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(keys,) int64: for each key the number that came with it first, `numbers` (growing) if it is new."""
        if not len(keys):
            return np.empty(0, np.int64)
        # 0 marks a free slot.
        unique, first, inverse = np.unique(
            np.where(keys == 0, np.uint64(1), keys), return_index=True, return_inverse=True
        )
        while (self._used + len(unique)) > _FULL * len(self._table):
            self._grow()
        return self._insert(unique, np.asarray(numbers, np.int64)[first])[inverse]

    def close(self) -> None:
        """Frees the file."""
        del self._table
        self._map.close()

    def _insert(self, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Of distinct keys, growing, so that what is looked at together lies together."""
        if self._table.nbytes <= _RESIDENT:
            return self._insert_some(keys, numbers)
        found = np.empty(len(keys), np.int64)
        for start in range(0, len(keys), _RESIDENT // _AROUND):
            some = slice(start, start + _RESIDENT // _AROUND)
            found[some] = self._insert_some(keys[some], numbers[some])
            _let_go(self._map)
        return found

    def _insert_some(self, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        table, last = self._table, np.uint64(len(self._table) - 1)
        slots = keys >> np.uint64(64 - (len(table) - 1).bit_length())
        found = numbers.copy()
        left = np.arange(len(keys))
        while len(left):
            at = slots[left]
            there = table["key"][at]
            is_free = there == 0
            # Several keys may want one free slot: the last that is written has it, the others go on.
            table["key"][at[is_free]] = keys[left[is_free]]
            is_mine = table["key"][at] == keys[left]
            new = left[is_free & is_mine]
            table["first"][slots[new]] = numbers[new]
            self._used += len(new)
            old = left[is_mine & ~is_free]
            found[old] = table["first"][slots[old]]
            left = left[~is_mine]
            slots[left] = (slots[left] + np.uint64(1)) & last
        return found

    def _grow(self) -> None:
        old, old_map = self._table, self._map
        self._table, self._map = _scratch(self._path, 2 * len(old))
        self._used = 0
        for start in range(0, len(old), _COPIED):
            part = old[start : start + _COPIED]
            part = part[part["key"] != 0]
            self._insert(part["key"].copy(), part["first"].copy())
            _let_go(old_map)
        del old, part
        old_map.close()


def _let_go(mapped: mmap.mmap) -> None:
    """Of the pages in memory: they are in the file."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _scratch(path: Path, slots: int) -> tuple[np.ndarray, mmap.mmap]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.posix_fallocate(handle, 0, slots * _SLOT.itemsize)  # a full disk is an error here, not a signal later
        mapped = mmap.mmap(handle, slots * _SLOT.itemsize)
    finally:
        os.close(handle)
        path.unlink()
    return np.frombuffer(mapped, _SLOT), mapped
