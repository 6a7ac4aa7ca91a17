"""Where text comes from: files, folders, globs and remote addresses, found in a fixed order and identified.

Read next: `reading.py`, which streams them.
"""

from __future__ import annotations

import collections
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import xxhash

from jaxscale.data import builtin
from jaxscale.data.errors import DataError

Kind = Literal["jsonl", "text", "parquet", "tar", "tfrecord", "array_record", "builtin"]
ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
"""Formats by file ending. A shard's number may follow (`.tfrecord-00003-of-00010`), and `.gz` where one can stream."""
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+(?=(\.gz)?$)")
_NOT_COMPRESSED = ("parquet", "array_record")

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
            digest.update(modified(source).encode())
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


def _format(address: str) -> tuple[Kind, bool] | None:
    name = _SHARD_NUMBER.sub("", address.lower())
    compressed = name.endswith(".gz")
    kind = ENDINGS.get(os.path.splitext(name[:-3] if compressed else name)[1])
    return None if kind is None or (compressed and kind in _NOT_COMPRESSED) else (kind, compressed)


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


def modified(source: Input) -> str:
    """What changes when the file is written to."""
    if source.kind == "builtin":
        return ""
    if not source.remote:
        return str(os.stat(source.address).st_mtime_ns)
    import fsspec

    system, path = fsspec.core.url_to_fs(source.address)
    info = system.info(path)
    return str(
        next((info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if key in info), "")
    )
