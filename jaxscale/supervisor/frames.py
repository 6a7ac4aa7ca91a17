"""Frames: how messages between agents and workers look on the wire. Pure: bytes in, messages out, no socket.

A frame is a fixed header (magic, protocol version, kind, length of the JSON part, length of the bulk part, seal), a
JSON object, and the bulk bytes. The seal is an HMAC-SHA256 over the frame's number on its connection, the header and
the JSON, with a key that only this direction of this connection has; `handshake.py` makes the keys. So a frame that was
changed, repeated, left out, or recorded on another connection is refused. Bulk bytes are not sealed: they are parts of
memory slots, and whoever uses them checks the slot's own digests (`checkpoint/slot.py`). Nothing is encrypted.
Read next: `handshake.py`.
"""

from __future__ import annotations

import enum
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAGIC = b"JXSF"
VERSION = 1
JSON_LIMIT = 1 << 20
"""Bytes of the JSON part of a frame at most."""
SEAL_BYTES = 32
NO_SEAL = bytes(SEAL_BYTES)
_FIELDS = struct.Struct("!4sHHIQ")
HEADER_BYTES = _FIELDS.size + SEAL_BYTES
_COUNTER = struct.Struct("!Q")


class FrameError(ValueError):
    """Bytes that are no frame of this protocol, this version and this connection. The connection cannot go on."""


class Kind(enum.IntEnum):
    """What a frame is for."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REQUEST = 5
    REPLY = 6
    REFUSAL = 7
    DATA = 8


@dataclass(frozen=True)
class Frame:
    """One message. Its `bulk_nbytes` bulk bytes follow it in the stream."""

    kind: Kind
    body: Mapping[str, Any]
    bulk_nbytes: int = 0


@dataclass(frozen=True)
class Bulk:
    """A piece of the bulk bytes of the frame before it."""

    data: bytes


@dataclass(frozen=True)
class _Header:
    fields: bytes
    kind: Kind
    json_nbytes: int
    bulk_nbytes: int
    seal: bytes


class FrameWriter:
    """Makes the frames of one direction of a connection. Without a key (during the handshake) they carry no seal."""

    def __init__(self) -> None:
        self._key: bytes | None = None
        self._number = 0

    def authenticate(self, key: bytes) -> None:
        """From here on every frame is sealed with `key`; numbers start at 0."""
        self._key, self._number = key, 0

    def frame(self, kind: Kind, body: Mapping[str, Any], bulk_nbytes: int = 0) -> bytes:
        """Header and JSON of the next frame; its bulk bytes are to be sent right after.

        Raises FrameError for a body above JSON_LIMIT, TypeError or ValueError for one that JSON cannot hold.
        """
        text = json.dumps(dict(body), allow_nan=False, separators=(",", ":")).encode()
        if len(text) > JSON_LIMIT:
            raise FrameError(
                f"a {kind.name} frame's JSON of {len(text)} bytes is above the limit of {JSON_LIMIT} bytes"
            )
        fields = _FIELDS.pack(MAGIC, VERSION, kind, len(text), bulk_nbytes)
        seal = NO_SEAL if self._key is None else _seal(self._key, self._number, fields, text)
        self._number += 1
        return fields + seal + text


class FrameParser:
    """Turns the bytes of one direction of a connection into frames. Holds no more than one frame's header and JSON.

    Either give everything to `feed`, or read exactly `wanted` bytes at a time and take the bulk bytes past the parser
    with `skip_bulk`. After a FrameError the parser refuses everything.
    """

    def __init__(self, bulk_limit: int = 0, json_limit: int = JSON_LIMIT) -> None:
        self.bulk_limit = bulk_limit
        """Bulk bytes that a frame may announce; may be changed between frames."""
        self.json_limit = json_limit
        """JSON bytes that a frame may announce; may be changed between frames."""
        self._key: bytes | None = None
        self._number = 0
        self._buffer = bytearray()
        self._header: _Header | None = None
        self._bulk_left = 0
        self._error = ""

    def authenticate(self, key: bytes) -> None:
        """From here on every frame has to carry the seal of `key`; numbers start at 0."""
        self._key, self._number = key, 0

    @property
    def wanted(self) -> int:
        """Bytes until the next thing is complete: a header, a header's JSON, or the bulk bytes of a frame."""
        if self._bulk_left:
            return self._bulk_left
        return (HEADER_BYTES if self._header is None else self._header.json_nbytes) - len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame | Bulk]:
        """What these bytes complete, in order. Raises FrameError."""
        if self._error:
            raise FrameError(self._error)
        found: list[Frame | Bulk] = []
        try:
            rest = memoryview(data)
            while True:
                count = min(self.wanted, len(rest))
                piece, rest = rest[:count], rest[count:]
                if self._bulk_left:
                    if not count:
                        break
                    found.append(Bulk(bytes(piece)))
                    self._bulk_left -= count
                    continue
                self._buffer += piece
                if self.wanted:
                    break
                if (frame := self._advance()) is not None:
                    found.append(frame)
        except FrameError as error:
            self._error = str(error)
            raise
        return found

    def skip_bulk(self, nbytes: int) -> None:
        """Tells that `nbytes` bulk bytes were read from the stream without passing through `feed`."""
        if nbytes > self._bulk_left:
            raise ValueError(f"{nbytes} bulk bytes were taken where {self._bulk_left} are left")
        self._bulk_left -= nbytes

    def end(self) -> None:
        """Tells that the stream has ended. Raises FrameError where it was cut short in the middle of a frame."""
        if self._error:
            raise FrameError(self._error)
        if self._buffer or self._header is not None or self._bulk_left:
            self._error = f"the stream ended in the middle of a frame: {self.wanted} more bytes were announced"
            raise FrameError(self._error)

    def _advance(self) -> Frame | None:
        taken = bytes(self._buffer)
        self._buffer.clear()
        if self._header is None:
            self._header = _parse_header(taken, self.json_limit, self.bulk_limit)
            return None
        header, self._header = self._header, None
        expected = NO_SEAL if self._key is None else _seal(self._key, self._number, header.fields, taken)
        if not hmac.compare_digest(expected, header.seal) and not self._is_early_refusal(header):
            raise FrameError(
                f"the seal of frame {self._number} ({header.kind.name}) is wrong: it was changed, is out of order, "
                "or belongs to another connection or another job"
            )
        self._number += 1
        self._bulk_left = header.bulk_nbytes
        return Frame(header.kind, _parse_body(taken, header.kind), header.bulk_nbytes)

    def _is_early_refusal(self, header: _Header) -> bool:
        """The answer to a wrong proof: the other end has no keys then. Forging it only ends the connection."""
        return self._number == 0 and header.kind is Kind.REFUSAL and header.seal == NO_SEAL


def _seal(key: bytes, number: int, fields: bytes, text: bytes) -> bytes:
    return hmac.digest(key, _COUNTER.pack(number) + fields + text, "sha256")


def _parse_header(data: bytes, json_limit: int, bulk_limit: int) -> _Header:
    magic, version, kind, json_nbytes, bulk_nbytes = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise FrameError(f"these bytes are of another protocol: they start with {magic!r}, a frame with {MAGIC!r}")
    if version != VERSION:
        raise FrameError(
            f"the peer speaks version {version} of the frame protocol, this side version {VERSION}; "
            "run the same version of jaxscale on all hosts"
        )
    try:
        known = Kind(kind)
    except ValueError:
        raise FrameError(f"frames of kind {kind} are unknown; there are 1 to {max(Kind)}") from None
    if json_nbytes > json_limit:
        raise FrameError(
            f"a {known.name} frame announces {json_nbytes} bytes of JSON; at most {json_limit} are taken here"
        )
    if bulk_nbytes > bulk_limit:
        raise FrameError(
            f"a {known.name} frame announces {bulk_nbytes} bulk bytes; at most {bulk_limit} are taken here"
        )
    return _Header(data[: _FIELDS.size], known, json_nbytes, bulk_nbytes, data[_FIELDS.size :])


def _parse_body(text: bytes, kind: Kind) -> dict[str, Any]:
    try:
        body = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the JSON of a {kind.name} frame of {len(text)} bytes cannot be read: {error}") from None
    if not isinstance(body, dict):
        raise FrameError(f"the JSON of a {kind.name} frame is a {type(body).__name__}; it has to be an object")
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
