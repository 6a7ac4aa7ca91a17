"""Hashes of all runs of n bytes of a text, at array speed. Read next: `filters.py`, `duplicates.py`: they count them.

A polynomial hash of 2^k bytes is made by doubling: h_2n[i] = h_n[i] B^n + h_n[i + n] modulo 2^64.
"""

from __future__ import annotations

import numpy as np

_BASE = 0x9E3779B97F4A7C15


def byte_windows(data: np.ndarray, length: int) -> np.ndarray:
    """(max(len(data) - length + 1, 0),) uint64: a hash of each run of `length` bytes, without visible order.

    data: (bytes,) uint8; length: a power of two.
    """
    if len(data) < length:
        return np.empty(0, np.uint64)
    hashes = data.astype(np.uint64) + np.uint64(1)
    size, power = 1, _BASE
    while size < length:
        hashes = hashes[:-size] * np.uint64(power) + hashes[size:]
        size, power = size * 2, power * power % 2**64
    return mix(hashes)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014), in place: uint64 hashes without visible order."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
