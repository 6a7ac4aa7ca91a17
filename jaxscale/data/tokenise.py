"""Blocks of text to arrays of token ids: a pure function. Read next: `workers.py`, which runs it on every core."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxscale.data.errors import DataError
from jaxscale.data.sources import Block, Cursor, Piece
from jaxscale.data.tokenizer import Tokenizer, token_dtype


class Tokenised(NamedTuple):
    """A block's documents as ids, each ended by the end-of-document token."""

    tokens: np.ndarray
    """(tokens,) uint16 or uint32."""
    lengths: np.ndarray
    """(documents,) int64: tokens of each document."""
    bytes: np.ndarray
    """(documents,) int64: UTF-8 bytes of each document."""
    largest: int
    after: Cursor
    consumed: int


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors put it before a text; it is none of it."""


def tokenise_block(block: Block, tokenizer: Tokenizer, text_field: str) -> Tokenised:
    """Raises DataError, naming file and line or byte, for text that is not UTF-8, not JSON, or without the field."""
    dtype = token_dtype(tokenizer.vocabulary)
    texts, sizes = [], []
    for piece in block.pieces:
        if block.lines:
            lines = list(_parse_lines(piece, text_field))
            texts += lines
            sizes += [len(text.encode()) for text in lines]
        else:
            data = piece.data.removeprefix(BYTE_ORDER_MARK) if piece.offset == 0 else piece.data
            texts.append(_decode(data, piece))
            sizes.append(len(data))
    end = np.array([tokenizer.end_of_document], dtype)
    documents = tokenizer.encode_batch(texts)
    tokens = np.concatenate([part for ids in documents for part in (ids, end)]) if documents else np.empty(0, dtype)
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= tokenizer.vocabulary:
        raise DataError(
            f"tokenizer {tokenizer.name} made token id {largest} beyond its vocabulary of {tokenizer.vocabulary}; "
            "its file is damaged: use another one"
        )
    lengths = np.array([len(ids) + 1 for ids in documents], np.int64)
    return Tokenised(
        tokens.astype(dtype, copy=False), lengths, np.array(sizes, np.int64), largest, block.after, block.consumed
    )


def _parse_lines(piece: Piece, text_field: str) -> Iterator[str]:
    offset = piece.offset
    for number, line in enumerate(piece.data.split(b"\n"), piece.line):
        if offset == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        where = Piece(piece.name, number, offset, line)
        offset += len(line) + 1
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, where))
        except DataError:  # of text that is not UTF-8
            raise
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
            raise DataError(
                f"{piece.name}:{number}: not valid JSON ({error}); correct the line (the file may be truncated)"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{piece.name}:{number}: a JSON {type(record).__name__}, not an object with a field {text_field!r}"
            )
        text = record.get(text_field)
        if not isinstance(text, str):
            problem = (
                f"field {text_field!r} holds {text!r:.40}, not text"
                if text_field in record
                else f"no field {text_field!r}"
            )
            raise DataError(
                f"{piece.name}:{number}: {problem}; the line has {', '.join(sorted(record)) or 'no fields'}: "
                "set data.text-field (--text-field) to the one with the text"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{piece.name}:{number}: the text has half a surrogate pair (\\ud8xx) and is no Unicode; "
                "remove or replace it in the line"
            ) from error
        yield text


def _decode(data: bytes, piece: Piece) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.start + max(piece.offset, 0)
        line = f":{piece.line}" if piece.line and piece.offset >= 0 else f", row {piece.line}" if piece.line else ""
        raise DataError(
            f"{piece.name}{line}: not UTF-8 at byte {byte}{'' if piece.offset >= 0 else ' of the text'} "
            f"(0x{data[error.start]:02x}, {error.reason}); convert the file to UTF-8"
        ) from error
