"""The text in a serialised `tf.train.Example`, read without TensorFlow. Read next: `record_files.py`.

    Example  { Features features = 1 }         Features { map<string, Feature> feature = 1 }
    Feature  { BytesList = 1 | FloatList = 2 | Int64List = 3 }         BytesList { repeated bytes value = 1 }

A map is a repeated message of key (1) and value (2). In protobuf's encoding each field is a varint `number << 3 | type`
and then, for type 2, which all of these have, a varint length and so many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxscale.data.errors import DataError

_BYTES_LIST, _LENGTH = 1, 2
_KINDS = {2: "floats", 3: "integers"}


class _NoMessage(ValueError):
    """Bytes that are no such message."""


def text_of_example(data: bytes, where: str, text_field: str) -> bytes | None:
    """Bytes of the feature; None when `data` is no Example. Raises DataError for one without that text."""
    try:
        features = dict(_features(data))
    except _NoMessage:
        return None
    if not features:
        return None
    if text_field not in features:
        raise DataError(
            f"{where}: no feature {text_field!r}; the record has {', '.join(sorted(features))}: "
            "set data.text-field (--text-field) to the one with the text"
        )
    kind, values = features[text_field]
    if kind != _BYTES_LIST or len(values) != 1:
        what = f"{len(values)} texts" if kind == _BYTES_LIST else _KINDS.get(kind, "nothing")
        raise DataError(
            f"{where}: feature {text_field!r} holds {what}, not one text; set data.text-field (--text-field) to the "
            "one with the text, or leave such records out"
        )
    return values[0]


def _features(data: bytes) -> Iterator[tuple[str, tuple[int, list[bytes]]]]:
    for number, features in _fields(data):
        if number != 1:
            raise _NoMessage
        for number, entry in _fields(features):
            if number != 1:
                raise _NoMessage
            parts = dict(_fields(entry))
            if not parts.keys() <= {1, 2}:
                raise _NoMessage
            try:
                name = parts.get(1, b"").decode()
            except UnicodeDecodeError as error:
                raise _NoMessage from error
            kinds = list(_fields(parts.get(2, b"")))
            if len(kinds) > 1 or (kinds and kinds[0][0] not in (1, 2, 3)):
                raise _NoMessage
            kind, content = kinds[0] if kinds else (0, b"")
            yield name, (kind, [value for _, value in _fields(content)] if kind == _BYTES_LIST else [])


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field. Raises _NoMessage for fields that have no length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        size, at = _varint(data, at)
        if tag & 7 != _LENGTH or at + size > len(data):
            raise _NoMessage
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Value, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise _NoMessage
