"""What passes from the readers to the processes that tokenise: runs of text with their place in the input.

Read next: `reading.py`, which makes blocks; `tokenise.py`, which takes them.
"""

from __future__ import annotations

from typing import NamedTuple


class Cursor(NamedTuple):
    """Where a block ends: which input, how far in it, and the number of the next line or row (from 0)."""

    input: int = 0
    offset: int = 0
    """Bytes of uncompressed text for jsonl, tar and TFRecord; row group for Parquet; records for ArrayRecord."""
    line: int = 0
    """Lines or records so far; rows so far in the row group for Parquet."""
    read: int = 0
    """Bytes of the input, as stored, that were read so far."""


START = Cursor()


class Piece(NamedTuple):
    """Text as read: a run of jsonl lines or one whole document, and where it came from."""

    name: str
    line: int
    """Number of the first line or row, from 1; 0 when the piece is a whole file."""
    offset: int
    """Byte offset of the piece in its (uncompressed) file; -1 when that has no meaning."""
    data: bytes
    input: int = 0
    """Number of the input it came from."""


class Problem(NamedTuple):
    """A record that cannot be used, or an input that cannot be read on from some record."""

    input: int
    record: int
    """Line, row or record from 1; 0 = the whole file."""
    message: str
    """What is wrong, where, and how to fix it."""
    lost: int = 0
    """Bytes of input, as stored, that were not read because of it; 0 = only this record is lost."""


class Block(NamedTuple):
    """What is tokenised at once. `lines`: pieces are runs of jsonl lines; otherwise each piece is a document."""

    lines: bool
    pieces: list[Piece]
    after: Cursor
    consumed: int
    """Bytes of input, as stored, read so far."""
    problems: tuple[Problem, ...] = ()
    """What the reader could not use; each record counts as read."""
