"""Inputs as blocks of documents, in a fixed order, from any cursor on (that is how a killed build goes on).

An input that turns out to be damaged is left where it breaks; the block says what was lost, and reading goes on with
the next input. JSON is parsed later, by the processes that tokenise. Read next: `tokenise.py`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, cast

from jaxscale.data import builtin, sources
from jaxscale.data.blocks import START, Block, Cursor, Piece, Problem
from jaxscale.data.errors import DamagedInput, TooLarge
from jaxscale.data.sources import Input, open_input

Reader = Callable[[Input, Cursor, str, int], Iterator[Block]]
"""(input, where to begin, text field, bytes of a block) -> blocks; `consumed` counts from the input's begin."""

_CHUNK = 1 << 16  # of compressed text, unpacked at once: what damage costs at most
_SKIPPED = 1 << 20  # bytes of a line that is too large, at once
_MOST_PROBLEMS = 1 << 12  # in one block
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


def read_blocks(inputs: Sequence[Input], text_field: str, size: int, start: Cursor = START) -> Iterator[Block]:
    """Blocks of about `size` bytes from `start` on; always the same documents in the same order.

    Raises DataError for what is no damage but a mistake: no such column, a package that is missing.
    """
    before = sum(source.size for source in inputs[: start.input])
    index = start.input
    while index < len(inputs):
        source = inputs[index]
        if source.kind == "text":
            stop = index + 1
            while stop < len(inputs) and inputs[stop].kind == "text" and _fits(inputs[index : stop + 1], size):
                stop += 1
            before += sum(text.size for text in inputs[index:stop])
            yield _read_texts(inputs, index, stop)._replace(consumed=before)
            index = stop
            continue
        last = position = start if index == start.input else Cursor(index)
        try:
            for block in _reader(source)(source, position, text_field, size):
                last = block.after._replace(read=block.consumed)
                pieces = [piece._replace(input=index) for piece in block.pieces]
                yield block._replace(pieces=pieces, after=last, consumed=before + block.consumed)
        except (DamagedInput, OSError) as error:
            lost = max(source.size - last.read, 1)
            record = error.record if isinstance(error, DamagedInput) else 0
            what = str(error) if isinstance(error, DamagedInput) else f"{source.address} cannot be read ({error})"
            problem = Problem(index, record or last.line + 1, what, lost)
            yield Block(False, [], Cursor(index + 1), before + source.size, (problem,))
        before += source.size
        index += 1


def _reader(source: Input) -> Reader:
    if source.kind == "jsonl":
        return _read_lines
    if source.kind == "builtin":
        return _read_builtin
    # What comes later in the order of reading, and is seldom wanted.
    if source.kind == "parquet":
        from jaxscale.data.parquet import read_parquet

        return read_parquet
    from jaxscale.data import record_files

    return {
        "tar": record_files.read_tar,
        "tfrecord": record_files.read_tfrecord,
        "array_record": record_files.read_array_record,
    }[source.kind]


def _fits(inputs: Sequence[Input], size: int) -> bool:
    return sum(source.size for source in inputs) <= size


def _read_texts(inputs: Sequence[Input], index: int, stop: int) -> Block:
    pieces, problems = [], []
    for number in range(index, stop):
        try:
            pieces.append(_read_text(inputs[number])._replace(input=number))
        except (DamagedInput, TooLarge) as error:
            problems.append(Problem(number, 0, str(error), inputs[number].size))
        except OSError as error:
            what = f"{inputs[number].address} cannot be read ({error})"
            problems.append(Problem(number, 0, what, inputs[number].size))
    return Block(False, pieces, Cursor(stop), 0, tuple(problems))


def _read_text(source: Input) -> Piece:
    with open_input(source) as file, decompressed(source, file) as text:
        data = text.read(sources.LARGEST_DOCUMENT + 1)
        check_size(data, source.address)
        return Piece(source.address, 0, 0, data)


def check_size(document: bytes, where: str) -> None:
    """Raises TooLarge for a document that is too large to be tokenised as a whole."""
    if len(document) > sources.LARGEST_DOCUMENT:
        raise TooLarge(too_large(where))


def too_large(where: str) -> str:
    """What to say of a document of more than `LARGEST_DOCUMENT` bytes."""
    limit = sources.LARGEST_DOCUMENT >> 20
    return (
        f"{where} is one document of more than {limit} MiB, which would take many times that in memory; split "
        "it into documents: a line of jsonl each, or smaller files in a folder (for lines of text: "
        f"`split -C {limit}m --additional-suffix=.txt FILE FOLDER/part-`)"
    )


def _read_lines(source: Input, start: Cursor, _: str, size: int) -> Iterator[Block]:
    with open_input(source) as file, decompressed(source, file) as text:
        text.seek(start.offset)
        offset, line = start.offset, start.line
        damage: BaseException | None = None
        while damage is None:
            data, skipped, damage = _read_whole_lines(source, text, size)
            if not data and not skipped:
                break
            pieces = [Piece(source.address, line + 1, offset, data)] if data else []
            offset, line = offset + len(data) + skipped, line + data.count(b"\n")
            problems: tuple[Problem, ...] = ()
            if skipped:
                line += 1
                problems = (Problem(start.input, line, too_large(f"{source.address}:{line}")),)
            yield Block(True, pieces, Cursor(start.input, offset, line), file.tell(), problems)
        if damage is not None:
            raise _cut_gzip(source, damage, line + 1) from damage


def _read_whole_lines(source: Input, text: IO[bytes], size: int) -> tuple[bytes, int, BaseException | None]:
    """About `size` bytes up to the end of a line; bytes of the line after it, if that is too large and was skipped; and
    what stopped the reading: then the bytes are those of the lines that are whole."""
    # read1 gives what was unpacked before the damage, where read would lose all that it had gathered.
    read = text.read1 if source.compressed else text.read  # type: ignore[attr-defined]  # of gzip.GzipFile
    data = bytearray()
    try:
        while len(data) < size and (part := read(min(_CHUNK, size - len(data)) if source.compressed else size)):
            data += part
        rest = text.readline(sources.LARGEST_DOCUMENT + 1) if data else b""
        if len(rest) <= sources.LARGEST_DOCUMENT:
            return bytes(data) + rest, 0, None
        end = data.rfind(b"\n") + 1
        skipped = len(data) - end + len(rest)
        while not rest.endswith(b"\n") and (rest := text.readline(_SKIPPED)):
            skipped += len(rest)
        return bytes(data[:end]), skipped, None
    except _GZIP_ERRORS as error:
        del data[data.rfind(b"\n") + 1 :]
        return bytes(data), 0, error


def collect(items: Iterator[tuple[Piece | Problem, Cursor, int]], size: int) -> Iterator[Block]:
    """Blocks of about `size` bytes from documents (or what is wrong with them), the cursor and bytes read after each.

    What was read before damage (DamagedInput, OSError, what gzip raises) comes first.
    """
    pieces: list[Piece] = []
    problems: list[Problem] = []
    count, after, consumed = 0, START, 0
    damage: Exception | None = None
    while damage is None:
        try:
            item = next(items, None)
        except (DamagedInput, OSError, *_GZIP_ERRORS) as error:
            item, damage = None, error
        if item is not None:
            one, after, consumed = item
            if isinstance(one, Piece):
                pieces.append(one)
                count += len(one.data)
            else:
                problems.append(one)
        if (pieces or problems) and (item is None or count >= size or len(problems) >= _MOST_PROBLEMS):
            yield Block(False, pieces, after, consumed, tuple(problems))
            pieces, problems, count = [], [], 0
        if item is None and damage is None:
            return
    raise damage


def _read_builtin(source: Input, start: Cursor, _: str, __: int) -> Iterator[Block]:
    pieces = [Piece(builtin.ADDRESS, i + 1, -1, text.encode()) for i, text in enumerate(builtin.documents())]
    if start.offset == 0:
        yield Block(False, pieces, Cursor(start.input, len(pieces)), source.size)


@contextmanager
def decompressed(source: Input, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The bytes that were compressed. Raises DamagedInput where they cannot be had back."""
    if not source.compressed:
        yield file
        return
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield cast(IO[bytes], unzipped)
    except _GZIP_ERRORS as error:
        raise _cut_gzip(source, error) from error


def _cut_gzip(source: Input, error: BaseException, record: int = 0) -> DamagedInput:
    return DamagedInput(
        f"{source.address} is not a whole gzip file ({error}); it may be truncated: fetch it again", record
    )
