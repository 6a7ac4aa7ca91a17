"""Where text comes from: files, folders, globs and remote addresses, read as blocks of documents in a fixed order.

`find_inputs` lists what a path means, `read_blocks` streams it from any cursor on (that is how a killed build goes on).
JSON is parsed later, by the processes that tokenise: see `tokenise.py`, the file to read next.
"""

from __future__ import annotations

import collections
import glob
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import xxhash

from jaxscale.data import builtin
from jaxscale.data.errors import DataError

Kind = Literal["jsonl", "text", "parquet", "builtin"]
ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}
"""Formats by file ending; jsonl and text may end in `.gz` on top."""

LARGEST_DOCUMENT = 1 << 26
"""Bytes of one document: it is tokenised as a whole, which takes 6 (bytes) to 130 (BPE) times its size in memory."""
WHOLE_CONTENT = 1 << 28  # bytes of input in all up to which identities are hashes of everything in the files
_EDGE = 1 << 16  # bytes hashed at each end of a file otherwise


@dataclass(frozen=True)
class Input:
    """One file to read (or the built-in corpus)."""

    address: str
    """Local path, or a remote address with `://` that fsspec opens."""
    kind: Kind
    compressed: bool
    size: int
    """Bytes as stored."""

    @property
    def remote(self) -> bool:
        return "://" in self.address


class Cursor(NamedTuple):
    """Where a block ends: which input, how far in it, and the number of the next line or row (from 0)."""

    input: int = 0
    offset: int = 0
    """Bytes of uncompressed text for jsonl; row group for Parquet; documents for the built-in corpus."""
    line: int = 0
    """Lines of jsonl so far; rows so far in the row group for Parquet."""


START = Cursor()


class Piece(NamedTuple):
    """Text as read: a run of jsonl lines or one whole document, and where it came from."""

    name: str
    line: int
    """Number of the first line or row, from 1; 0 when the piece is a whole file."""
    offset: int
    """Byte offset of the piece in its (uncompressed) file; -1 when that has no meaning."""
    data: bytes


class Block(NamedTuple):
    """What is tokenised at once. `lines`: pieces are runs of jsonl lines; otherwise each piece is a document."""

    lines: bool
    pieces: list[Piece]
    after: Cursor
    consumed: int
    """Bytes of input, as stored, read so far."""


def find_inputs(paths: Sequence[str]) -> list[Input]:
    """The inputs that files, folders, globs and remote addresses stand for, in a fixed order.

    Folders are searched deeply for known endings; hidden files are left out. Raises DataError when a path matches
    nothing, a file is empty, or its format is unknown.
    """
    found: list[Input] = []
    for path in paths:
        if path == builtin.ADDRESS:
            found.append(Input(path, "builtin", False, sum(len(d.encode()) for d in builtin.documents())))
        else:
            found.extend(_find_remote(path) if "://" in path else _find_local(path))
    if not found:
        raise DataError("no data was given; name at least one file, folder or glob")
    address, count = collections.Counter(source.address for source in found).most_common(1)[0]
    if count > 1:
        raise DataError(f"{address} is named {count} times; give each file once")
    return found


def identities(inputs: Sequence[Input]) -> list[str]:
    """A string per input that changes with its content, and not with its name.

    Up to 256 MiB in all everything is hashed. Above that, reading it all before every run would take too long: then
    size, modification time and both ends of each file stand for it.
    """
    whole = sum(source.size for source in inputs) <= WHOLE_CONTENT
    return [_identity(source, whole) for source in inputs]


def _identity(source: Input, whole: bool) -> str:
    if source.kind == "builtin":
        return builtin.IDENTITY
    digest = xxhash.xxh3_128(f"{source.kind} {source.compressed} {source.size}".encode())
    with open_input(source) as file:
        if whole or source.size <= 2 * _EDGE:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        else:
            digest.update(file.read(_EDGE))
            file.seek(source.size - _EDGE)
            digest.update(file.read(_EDGE))
            digest.update(_modified(source).encode())
    return digest.hexdigest()


@contextmanager
def open_input(source: Input) -> Iterator[IO[bytes]]:
    """The stored bytes of an input. Raises DataError when it cannot be opened."""
    try:
        if source.remote:
            import fsspec  # type: ignore[import-untyped]  # no stubs

            file = cast(IO[bytes], fsspec.open(source.address, "rb").open())
        else:
            file = open(source.address, "rb")  # noqa: SIM115  # closed below; the except must not cover the body
    except OSError as error:
        raise DataError(f"cannot open {source.address}: {error.strerror or error}") from error
    with file:
        yield file


def read_blocks(inputs: Sequence[Input], text_field: str, size: int, start: Cursor = START) -> Iterator[Block]:
    """Blocks of about `size` bytes from `start` on; always the same documents in the same order.

    Raises DataError for what cannot be read (truncated, not Parquet, no such column).
    """
    before = sum(source.size for source in inputs[: start.input])
    index = start.input
    while index < len(inputs):
        source = inputs[index]
        position = start if index == start.input else Cursor(index)
        if source.kind == "text":
            stop = index + 1
            while stop < len(inputs) and inputs[stop].kind == "text" and _fits(inputs[index : stop + 1], size):
                stop += 1
            pieces = [_read_text(text) for text in inputs[index:stop]]
            before += sum(text.size for text in inputs[index:stop])
            yield Block(False, pieces, Cursor(stop), before)
            index = stop
            continue
        reader = {"jsonl": _read_lines, "parquet": _read_parquet, "builtin": _read_builtin}[source.kind]
        for block in reader(source, position, text_field, size):
            yield block._replace(consumed=before + block.consumed)
        before += source.size
        index += 1


def _fits(inputs: Sequence[Input], size: int) -> bool:
    return sum(source.size for source in inputs) <= size


def _read_text(source: Input) -> Piece:
    with open_input(source) as file, _decompressed(source, file) as text:
        data = text.read(LARGEST_DOCUMENT + 1)
        _check_size(data, source.address)
        return Piece(source.address, 0, 0, data)


def _check_size(document: bytes, where: str) -> None:
    if len(document) > LARGEST_DOCUMENT:
        limit = LARGEST_DOCUMENT >> 20
        raise DataError(
            f"{where} is one document of more than {limit} MiB, which would take many times that in memory; split "
            "it into documents: a line of jsonl each, or smaller files in a folder (for lines of text: "
            f"`split -C {limit}m --additional-suffix=.txt FILE FOLDER/part-`)"
        )


def _read_lines(source: Input, start: Cursor, _: str, size: int) -> Iterator[Block]:
    with open_input(source) as file, _decompressed(source, file) as text:
        text.seek(start.offset)
        offset, line = start.offset, start.line
        while data := text.read(size):
            rest = text.readline(LARGEST_DOCUMENT + 1)
            _check_size(rest, f"{source.address}:{line + data.count(b'\n') + 1}")
            data += rest
            piece = Piece(source.address, line + 1, offset, data)
            offset, line = offset + len(data), line + data.count(b"\n")
            yield Block(True, [piece], Cursor(start.input, offset, line), file.tell())


def _read_parquet(source: Input, start: Cursor, text_field: str, size: int) -> Iterator[Block]:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]  # no stubs
        import pyarrow.parquet as pq  # type: ignore[import-untyped]  # no stubs
    except ImportError as error:
        raise DataError(f"{source.address} is Parquet, which needs pyarrow: pip install 'jaxscale[parquet]'") from error
    with open_input(source) as file:
        try:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            if text_field not in names:
                raise DataError(
                    f"{source.address} has no column {text_field!r}; it has {', '.join(names)}: "
                    "set data.text-field (--text-field) to the one with the text"
                )
            before = 0
            for group in range(table.num_row_groups):
                if group >= start.offset:
                    skip = start.line if group == start.offset else 0
                    share = source.size * (group + 1) // table.num_row_groups
                    column = _texts(table, group, text_field, source.address, before)
                    for pieces, row in _gather(itertools.islice(column, skip, None), size, skip):
                        yield Block(False, pieces, Cursor(start.input, group, row), share)
                before += table.metadata.row_group(group).num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{source.address} is not readable Parquet ({' '.join(str(error).split())}); "
                "it may be truncated: fetch it again"
            ) from error


def _texts(table: Any, group: int, field: str, name: str, before: int) -> Iterator[Piece]:
    """The rows of one row group; `before`: rows of the groups before it."""
    import pyarrow as pa

    row = before
    for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[field]):
        column = batch.column(0)
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast("large_binary")  # the bytes as stored: UTF-8 is checked where they are decoded
        for text in column:
            row += 1
            value = text.as_py()
            if not isinstance(value, bytes):
                raise DataError(
                    f"{name}, row {row}: column {field!r} holds {value!r:.40}, not text; "
                    "set data.text-field (--text-field) to the column with the text, or leave such rows out of the file"
                )
            _check_size(value, f"{name}, row {row}")
            yield Piece(name, row, -1, value)


def _gather(pieces: Iterator[Piece], size: int, row: int) -> Iterator[tuple[list[Piece], int]]:
    """Lists of about `size` bytes, each with the number of rows up to its end."""
    held: list[Piece] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece.data)
        row += 1
        if count >= size:
            yield held, row
            held, count = [], 0
    if held:
        yield held, row


def _read_builtin(source: Input, start: Cursor, _: str, __: int) -> Iterator[Block]:
    pieces = [Piece(builtin.ADDRESS, i + 1, -1, text.encode()) for i, text in enumerate(builtin.documents())]
    if start.offset == 0:
        yield Block(False, pieces, Cursor(start.input, len(pieces)), source.size)


@contextmanager
def _decompressed(source: Input, file: IO[bytes]) -> Iterator[IO[bytes]]:
    if not source.compressed:
        yield file
        return
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield cast(IO[bytes], unzipped)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{source.address} is not a whole gzip file ({error}); it may be truncated: fetch it again"
        ) from error


def _format(address: str) -> tuple[Kind, bool] | None:
    name = address.lower()
    compressed = name.endswith(".gz")
    kind = ENDINGS.get(os.path.splitext(name[:-3] if compressed else name)[1])
    return None if kind is None or (compressed and kind == "parquet") else (kind, compressed)


def _input(address: str, size: int) -> Input:
    known = _format(address)
    if known is None:
        raise DataError(
            f"cannot tell the format of {address} by its ending; known are {', '.join(ENDINGS)}, also with .gz"
        )
    if size == 0:
        raise DataError(f"{address} is empty (0 bytes); fetch it again or leave it out")
    return Input(address, *known, size)


def _find_local(path: str) -> list[Input]:
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        files = [
            os.path.join(folder, name)
            for folder, folders, names in os.walk(expanded)
            for name in names
            if not any(part.startswith(".") for part in Path(folder, name).relative_to(expanded).parts)
        ]
        return _known_in_folder(path, {file: os.path.getsize(file) for file in files})
    files = (
        [expanded]
        if os.path.isfile(expanded)
        else sorted(f for f in glob.glob(expanded, recursive=True) if os.path.isfile(f))
    )
    if not files:
        what = "is no plain file, and data is read more than once" if os.path.exists(expanded) else "is not there"
        raise DataError(f"{path or repr(path)} {what}; give a file, a folder, a glob or a built token folder")
    return [_input(file, os.path.getsize(file)) for file in files]


def _find_remote(address: str) -> list[Input]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        protocol = address.split("://", 1)[0]
        if system.isdir(path):
            sizes = {
                f"{protocol}://{name.lstrip('/')}": info["size"]
                for name, info in system.find(path, detail=True).items()
            }
            return _known_in_folder(address, sizes)
        names = [path] if system.isfile(path) else sorted(system.glob(path)) if glob.has_magic(path) else []
        sizes = {f"{protocol}://{name.lstrip('/')}": system.size(name) for name in names}
    except ImportError as error:
        raise DataError(
            f"cannot read {address}: {error}; install what is named there, or fetch the file and give its path"
        ) from error
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {address}: {error}") from error
    if not sizes:
        raise DataError(f"{address} is not there; give a file, a folder or a glob")
    return [_input(name, size) for name, size in sizes.items()]


def _known_in_folder(path: str, sizes: dict[str, int]) -> list[Input]:
    known = {name: size for name, size in sizes.items() if _format(name)}
    if not known:
        raise DataError(f"folder {path} holds no file of a known format; known are {', '.join(ENDINGS)}, also with .gz")
    return [_input(name, known[name]) for name in sorted(known)]


def _modified(source: Input) -> str:
    if not source.remote:
        return str(os.stat(source.address).st_mtime_ns)
    import fsspec

    system, path = fsspec.core.url_to_fs(source.address)
    info = system.info(path)
    return str(
        next((info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if key in info), "")
    )
