"""Windows of tokens to rows of a batch: targets, segment ids, positions and loss weights. Pure, a whole batch at once.

Legend: B rows, S tokens per row. Read next: `mixture.py`, which says which window a row is.
"""

from __future__ import annotations

import numpy as np

Rows = dict[str, np.ndarray]
"""tokens, targets, segment_ids, positions: (B, S) int32; loss_weight: (B, S) float32; row: (B,) uint32."""


def make_rows(tokens: np.ndarray, starts: np.ndarray, row: np.ndarray) -> Rows:
    """Rows of windows that overlap by one token, so that every token is a target once.

    `tokens`: (B, S + 1) int32; `starts`: (B, S + 1) bool, True where a document starts; `row`: (B,) global row ids,
    kept modulo 2^32. Segment ids count documents within the row from 1, positions restart at 0 at each (a document
    begun before the window is at position 0 at the row's start). The weight is 0 where the target belongs to another
    document than the token, otherwise 1.
    """
    count, sequence = tokens.shape[0], tokens.shape[1] - 1
    first = starts[:, :sequence].copy()
    first[:, 0] = True
    # Segments of all rows one after the other; repeating their facts is several times faster than scans over tokens.
    begin = np.flatnonzero(first).astype(np.int32)
    length = np.diff(begin, append=np.int32(count * sequence))
    number = np.arange(len(begin), dtype=np.int32)
    number -= np.flatnonzero(begin % sequence == 0).astype(np.int32)[begin // sequence] - 1
    positions = np.arange(count * sequence, dtype=np.int32) - np.repeat(begin, length)
    return {
        "tokens": tokens[:, :sequence],
        "targets": tokens[:, 1:],
        "segment_ids": np.repeat(number, length).reshape(count, sequence),
        "positions": positions.reshape(count, sequence),
        "loss_weight": np.logical_not(starts[:, 1:]).astype(np.float32),
        "row": (row & 0xFFFFFFFF).astype(np.uint32),
    }


def empty_rows(sequence: int, row: np.ndarray) -> Rows:
    """Rows that only fill a batch: weight 0, segment 0, token 0, but row ids of their own."""
    shape = (len(row), sequence)
    rows: Rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return {**rows, "loss_weight": np.zeros(shape, np.float32), "row": (row & 0xFFFFFFFF).astype(np.uint32)}


def join_rows(parts: list[Rows]) -> Rows:
    """The rows of all parts, one after the other."""
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
