"""Documents from WebDataset tar, TFRecord and ArrayRecord: a sample or record is a document. Read next: `tokenise.py`.

What a record holds is seen from it: a `tf.train.Example` or a JSON object with a field for the text, otherwise it is
the text itself. In a tar, files that share a name up to its first dot are a sample; its text is its `.txt`, otherwise
the field of its `.json`. TFRecord's framing: length, its masked CRC32C, data, its masked CRC32C (little-endian).
"""

from __future__ import annotations

import json
import posixpath
import struct
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from jaxscale.data import sources
from jaxscale.data.blocks import Block, Cursor, Piece, Problem
from jaxscale.data.errors import DamagedInput, DataError
from jaxscale.data.example import text_of_example
from jaxscale.data.reading import check_size, collect, decompressed, too_large
from jaxscale.data.sources import Input, open_input
from jaxscale.data.tokenise import text_of

Item = tuple[Piece | Problem, Cursor, int]
_TEXTS, _OBJECTS = ("txt", "text", "md"), ("json",)
_HEAD, _CHECK = struct.Struct("<QI"), struct.Struct("<I")
_TAR_BLOCK = 512
_AT_ONCE = 256  # records of an ArrayRecord file


def read_tar(source: Input, start: Cursor, text_field: str, size: int) -> Iterator[Block]:
    """Blocks of the samples of a tar. Raises DamagedInput."""
    with open_input(source) as file, decompressed(source, file) as plain:
        yield from collect(_samples(source, file, plain, start, text_field), size)


def read_tfrecord(source: Input, start: Cursor, text_field: str, size: int) -> Iterator[Block]:
    """Blocks of the records of a TFRecord file. Raises DamagedInput, and DataError without the library."""
    try:
        import google_crc32c  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  # an extra
    except ImportError as error:
        raise DataError(
            f"{source.address} is TFRecord, which needs google-crc32c: pip install 'jaxscale[records]'"
        ) from error
    with open_input(source) as file, decompressed(source, file) as plain:
        yield from collect(_tfrecords(source, file, plain, start, text_field), size)


def read_array_record(source: Input, start: Cursor, text_field: str, size: int) -> Iterator[Block]:
    """Blocks of the records of an ArrayRecord file. Raises DamagedInput, and DataError for a remote one."""
    if source.remote:
        raise DataError(
            f"{source.address} is ArrayRecord, which is read from local files only; fetch it and give its path"
        )
    yield from collect(_array_records(source, start, text_field), size)


def text_of_record(data: bytes, where: str, text_field: str) -> bytes:
    """UTF-8 (or what should be) of a record's text. Raises DataError where it has none."""
    text = text_of_example(data, where, text_field)
    if text is not None:
        return text
    if data[:1] == b"{":
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            if data.lstrip(b"{ \t\r\n")[:1] != b'"':
                return data  # a text that begins with a brace
            raise DataError(f"{where}: not valid JSON ({error}); correct the record") from error
        return text_of(record, where, "record", text_field).encode()
    return data


def _item(source: Input, number: int, input_: int, where: str, data: bytes, text_field: str) -> Piece | Problem:
    try:
        text = text_of_record(data, where, text_field)
        check_size(text, where)
    except DataError as error:
        return Problem(input_, number, str(error))
    return Piece(source.address, number, -1, text)


class _Watched:
    """A file that remembers its last read, by which the end of a tar is told from damage."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.last = b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.last = self._file.read(size)
        return self.last


def _samples(source: Input, file: IO[bytes], plain: IO[bytes], start: Cursor, text_field: str) -> Iterator[Item]:
    held: dict[str, bytes] = {}
    count, key = 0, ""
    watched = _Watched(plain)
    try:
        with tarfile.open(fileobj=cast(Any, watched), mode="r:") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members.clear()  # it would keep a record of every member
                folder, name = posixpath.split(member.name)
                stem, _, ending = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                if held and key != posixpath.join(folder, stem):
                    count += 1
                    if count > start.offset:
                        yield (
                            _sample(source, count, start.input, key, held, text_field),
                            _after(start, count),
                            file.tell(),
                        )
                    held = {}
                key = posixpath.join(folder, stem)
                wanted = ending.lower() in (*_TEXTS, *_OBJECTS) and count >= start.offset
                held[ending.lower()] = _member(tar, member) if wanted else b""
            if watched.last != bytes(_TAR_BLOCK):
                raise tarfile.ReadError("it breaks off, or a header is damaged")
    except tarfile.TarError as error:
        done = count + 1
        raise DamagedInput(
            f"{source.address} is not a whole tar file ({error}, after {count} samples); fetch it again", done
        ) from error
    if held:
        count += 1
        if count > start.offset:
            yield _sample(source, count, start.input, key, held, text_field), _after(start, count), file.tell()


def _after(start: Cursor, count: int) -> Cursor:
    return Cursor(start.input, count, count)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Its content, or as much as shows that it is too large."""
    content = tar.extractfile(member)
    assert content is not None
    return content.read(sources.LARGEST_DOCUMENT + 1)


def _sample(
    source: Input, number: int, input_: int, key: str, held: dict[str, bytes], text_field: str
) -> Piece | Problem:
    where = f"{source.address}, sample {number} ({key})"
    try:
        for ending in (*_TEXTS, *_OBJECTS):
            if ending in held:
                check_size(held[ending], where)
                return Piece(source.address, number, -1, _of_member(held[ending], ending, where, text_field))
    except DataError as error:
        return Problem(input_, number, str(error))
    have = ", ".join(f".{ending}" for ending in held)
    return Problem(input_, number, f"{where}: no text; it has {have}, a text is in .txt, or in a field of .json")


def _of_member(data: bytes, ending: str, where: str, text_field: str) -> bytes:
    if ending in _TEXTS:
        return data
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); correct the file {ending} of the sample") from error
    return text_of(record, where, "record", text_field).encode()


def _tfrecords(source: Input, file: IO[bytes], plain: IO[bytes], start: Cursor, text_field: str) -> Iterator[Item]:
    plain.seek(start.offset)
    offset, number = start.offset, start.line
    while head := plain.read(_HEAD.size):
        number += 1
        where = f"{source.address}, record {number}"
        if len(head) < _HEAD.size:
            raise _cut(source, number)
        length, check = _HEAD.unpack(head)
        if _masked_crc(head[:8]) != check:
            raise DamagedInput(
                f"{where}: the checksum of its length is wrong, so the next record cannot be found; fetch it again",
                number,
            )
        offset += _HEAD.size + length + _CHECK.size
        item: Piece | Problem
        if length > sources.LARGEST_DOCUMENT:
            item = Problem(start.input, number, too_large(where))
            plain.seek(offset - 1)
            if not plain.read(1):
                raise _cut(source, number)
        else:
            data, check = plain.read(length), plain.read(_CHECK.size)
            if len(data) < length or len(check) < _CHECK.size:
                raise _cut(source, number)
            if _masked_crc(data) != _CHECK.unpack(check)[0]:
                item = Problem(start.input, number, f"{where}: its checksum is wrong; fetch the file again")
            else:
                item = _item(source, number, start.input, where, data, text_field)
        yield item, Cursor(start.input, offset, number), file.tell()


def _cut(source: Input, number: int) -> DamagedInput:
    return DamagedInput(
        f"{source.address} is no whole TFRecord file (it ends inside record {number}); fetch it again", number
    )


def _masked_crc(data: bytes) -> int:
    import google_crc32c

    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _array_records(source: Input, start: Cursor, text_field: str) -> Iterator[Item]:
    from array_record.python import array_record_module  # type: ignore[import-untyped, unused-ignore]  # no stubs

    try:
        reader = array_record_module.ArrayRecordReader(source.address)
    except Exception as error:  # the library raises what its C++ gives it
        raise DamagedInput(f"{source.address} is not readable ArrayRecord ({error}); fetch it again", 1) from error
    try:
        count = reader.num_records()
        if not count:  # so looks a file without its footer, and the reader says why at its end
            why = _close(reader) or "it has no records"
            raise DamagedInput(f"{source.address} is not readable ArrayRecord ({why}); fetch it again", 1)
        for first in range(start.offset, count, _AT_ONCE):
            stop = min(first + _AT_ONCE, count)
            for number, data in enumerate(_read_records(reader, first, stop), first + 1):
                where = f"{source.address}, record {number}"
                item: Piece | Problem
                if isinstance(data, bytes):
                    item = _item(source, number, start.input, where, data, text_field)
                else:
                    item = Problem(start.input, number, f"{where}: it cannot be read ({data}); fetch the file again")
                yield item, Cursor(start.input, number, number), source.size * number // count
    finally:
        _close(reader)


def _close(reader: Any) -> str:
    """What the reader has to say against the file, if anything."""
    try:
        reader.close()
    except Exception as error:
        return str(error)
    return ""


def _read_records(reader: Any, first: int, stop: int) -> list[bytes | Exception]:
    try:
        found = list(reader.read(list(range(first, stop))))
        if len(found) == stop - first:
            return found
    except Exception as error:
        if stop - first == 1:
            return [error]
    if stop - first == 1:
        return [ValueError("nothing was read")]
    middle = (first + stop) // 2
    return [*_read_records(reader, first, middle), *_read_records(reader, middle, stop)]
