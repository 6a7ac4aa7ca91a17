"""Blocks of text to arrays of token ids: a pure function. Read next: `workers.py`, which runs it on every core.

What cannot be used, or is not wanted, comes back with its place in the input: the block's other documents are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxscale.data.blocks import Block, Cursor, Piece, Problem
from jaxscale.data.duplicates import Keys, make_keys
from jaxscale.data.errors import DataError
from jaxscale.data.filters import first_refusal
from jaxscale.data.selection import Selection
from jaxscale.data.tokenizer import Tokenizer, token_dtype


class Places(NamedTuple):
    """Where documents came from."""

    inputs: np.ndarray
    """(documents,) int64: number of the input, from 0."""
    records: np.ndarray
    """(documents,) int64: line, row or record, from 1; 0 = the input is one document."""


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
    places: Places
    """Of the documents."""
    keys: Keys
    """By which duplicates are found; empty where they are not looked for."""
    refused: tuple[tuple[str, Places], ...] = ()
    """Documents that a filter dropped, by its name."""
    problems: tuple[Problem, ...] = ()
    """In the order of the input."""


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors put it before a text; it is none of it."""


def tokenise_block(block: Block, tokenizer: Tokenizer, selection: Selection) -> Tokenised:
    """Raises DataError for a tokenizer that makes ids beyond its vocabulary."""
    dtype = token_dtype(tokenizer.vocabulary)
    texts: list[str] = []
    sizes: list[int] = []
    at: list[tuple[int, int]] = []
    problems = list(block.problems)
    refused: dict[str, list[tuple[int, int]]] = {}
    for found in _documents(block, selection.text_field):
        if isinstance(found, Problem):
            problems.append(found)
            continue
        input_, record, text, size = found
        reason = first_refusal(text, selection.filters) if selection.filters else ""
        if reason:
            refused.setdefault(reason, []).append((input_, record))
            continue
        texts.append(text)
        sizes.append(size)
        at.append((input_, record))
    end = np.array([tokenizer.end_of_document], dtype)
    documents = tokenizer.encode_batch(texts)
    tokens = np.concatenate([part for ids in documents for part in (ids, end)]) if documents else np.empty(0, dtype)
    largest = int(tokens.max()) if len(tokens) else 0
    if largest >= tokenizer.vocabulary:
        raise DataError(
            f"tokenizer {tokenizer.name} made token id {largest} beyond its vocabulary of {tokenizer.vocabulary}; "
            "its file is damaged: use another one"
        )
    return Tokenised(
        tokens.astype(dtype, copy=False),
        np.array([len(ids) + 1 for ids in documents], np.int64),
        np.array(sizes, np.int64),
        largest,
        block.after,
        block.consumed,
        _places(at),
        make_keys(texts, selection.deduplicate),
        tuple((reason, _places(places)) for reason, places in refused.items()),
        tuple(sorted(problems)),
    )


def _places(at: list[tuple[int, int]]) -> Places:
    both = np.array(at, np.int64).reshape(-1, 2)
    return Places(both[:, 0], both[:, 1])


def _documents(block: Block, text_field: str) -> Iterator[tuple[int, int, str, int] | Problem]:
    """Input, record, text and its UTF-8 bytes of each document, or what is wrong with it."""
    for piece in block.pieces:
        if block.lines:
            yield from _parse_lines(piece, text_field)
            continue
        data = piece.data.removeprefix(BYTE_ORDER_MARK) if piece.offset == 0 else piece.data
        try:
            yield piece.input, piece.line, _decode(data, piece), len(data)
        except DataError as error:
            yield Problem(piece.input, piece.line, str(error))


def _parse_lines(piece: Piece, text_field: str) -> Iterator[tuple[int, int, str, int] | Problem]:
    offset = piece.offset
    for number, line in enumerate(piece.data.split(b"\n"), piece.line):
        if offset == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        start, offset = offset, offset + len(line) + 1
        if not line.strip():
            continue
        try:
            text = _parse_line(line, number, start, piece.name, text_field)
            yield piece.input, number, text, len(text) if text.isascii() else len(text.encode())
        except DataError as error:
            yield Problem(piece.input, number, str(error))


def _parse_line(line: bytes, number: int, offset: int, name: str, text_field: str) -> str:
    try:
        record = json.loads(_decode(line, Piece(name, number, offset, line)))
    except DataError:  # of text that is not UTF-8
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise DataError(
            f"{name}:{number}: not valid JSON ({error}); correct the line (the file may be truncated)"
        ) from error
    return text_of(record, f"{name}:{number}", "line", text_field)


def text_of(record: object, where: str, what: str, text_field: str) -> str:
    """The text of what JSON has read. Raises DataError where there is none; `what`: `line` or `record`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, not an object with a field {text_field!r}")
    text = record.get(text_field)
    if not isinstance(text, str):
        problem = (
            f"field {text_field!r} holds {text!r:.40}, not text" if text_field in record else f"no field {text_field!r}"
        )
        raise DataError(
            f"{where}: {problem}; the {what} has {', '.join(sorted(record)) or 'no fields'}: "
            "set data.text-field (--text-field) to the one with the text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text has half a surrogate pair (\\ud8xx) and is no Unicode; "
            f"remove or replace it in the {what}"
        ) from error
    return text


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
