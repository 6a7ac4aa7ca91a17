"""The handshake: both ends of a connection prove that they have the job's token. Pure: frames in, bytes out.

    client -> HELLO      job, name, role, nonce of the client
    server -> CHALLENGE  nonce of the server, proof of the server
    client -> PROOF      proof of the client
    server -> WELCOME    the first sealed frame

A proof is an HMAC-SHA256 by the token over the side, the job, the client's name and role, and both nonces. The token
never crosses the wire; fresh nonces make what was recorded on one connection worthless on every other. The keys that
seal the frames afterwards, one a direction, come from the same values. Read next: `channel.py`.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxscale.supervisor.frames import Frame, FrameError, FrameWriter, Kind
from jaxscale.supervisor.job_token import Token

NONCE_BYTES = 32
JSON_LIMIT = 4096
"""Bytes of JSON that a peer may make this side hold before it has proved anything."""
NAME_LENGTH = 128


class AuthenticationError(RuntimeError):
    """The peer does not have this job's token, or belongs to another job."""


@dataclass(frozen=True)
class Session:
    """What both ends know after the handshake."""

    name: str
    """The client's name, such as `host-0`."""
    role: str
    """The client's role: `agent` or `worker`."""
    client_key: bytes
    """Seals what the client sends."""
    server_key: bytes
    """Seals what the server sends."""


class ClientHandshake:
    """The connecting side."""

    def __init__(self, job: str, token: Token, name: str, role: str) -> None:
        self._facts = _Facts(job, name, role, secrets.token_bytes(NONCE_BYTES), b"")
        self._token = token

    def hello(self) -> bytes:
        """The first frame."""
        facts = self._facts
        body = {"job": facts.job, "name": facts.name, "role": facts.role, "nonce": facts.client_nonce.hex()}
        return FrameWriter().frame(Kind.HELLO, body)

    def prove(self, challenge: Frame) -> tuple[bytes, Session]:
        """The answer to the server's challenge. Raises AuthenticationError where the server has another token."""
        _expect(challenge, Kind.CHALLENGE)
        facts = self._facts.answered(_hex(challenge.body, "nonce"))
        if not hmac.compare_digest(facts.digest(self._token, "server proof"), _hex(challenge.body, "proof")):
            raise AuthenticationError(
                "the server could not prove that it has this job's token; it is of another job, or of an earlier run"
            )
        proof = facts.digest(self._token, "client proof").hex()
        return FrameWriter().frame(Kind.PROOF, {"proof": proof}), facts.session(self._token)


class ServerHandshake:
    """The listening side."""

    def __init__(self, job: str, token: Token) -> None:
        self._job, self._token = job, token
        self._facts: _Facts | None = None

    def challenge(self, hello: Frame) -> bytes:
        """The answer to HELLO. Raises FrameError, AuthenticationError."""
        _expect(hello, Kind.HELLO)
        job, name, role = (_text(hello.body, field) for field in ("job", "name", "role"))
        if job != self._job:
            raise AuthenticationError(f"the peer belongs to job {job!a}; this is job {self._job!a}")
        facts = _Facts(job, name, role, _hex(hello.body, "nonce"), secrets.token_bytes(NONCE_BYTES))
        self._facts = facts
        proof = facts.digest(self._token, "server proof").hex()
        return FrameWriter().frame(Kind.CHALLENGE, {"nonce": facts.server_nonce.hex(), "proof": proof})

    def check(self, proof: Frame) -> Session:
        """What the peer has proved. Raises FrameError, AuthenticationError."""
        _expect(proof, Kind.PROOF)
        facts, self._facts = self._facts, None  # a challenge is good for one attempt
        if facts is None:
            raise FrameError("a PROOF came before a HELLO")
        if not hmac.compare_digest(facts.digest(self._token, "client proof"), _hex(proof.body, "proof")):
            raise AuthenticationError(f"{facts.role} {facts.name!a} could not prove that it has this job's token")
        return facts.session(self._token)


@dataclass(frozen=True)
class _Facts:
    job: str
    name: str
    role: str
    client_nonce: bytes
    server_nonce: bytes

    def answered(self, server_nonce: bytes) -> _Facts:
        return _Facts(self.job, self.name, self.role, self.client_nonce, server_nonce)

    def digest(self, token: Token, purpose: str) -> bytes:
        """One value for each purpose, so that no message of one can serve as another (a reflected proof, for one)."""
        words = (purpose, self.job, self.name, self.role)
        parts = [word.encode() for word in words] + [self.client_nonce, self.server_nonce]
        message = b"jaxscale handshake 1" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(token.secret, message, "sha256")

    def session(self, token: Token) -> Session:
        return Session(self.name, self.role, self.digest(token, "client key"), self.digest(token, "server key"))


def _expect(frame: Frame, kind: Kind) -> None:
    if frame.kind is not kind:
        raise FrameError(f"a {frame.kind.name} frame came where the handshake expects {kind.name}")


def _text(body: Mapping[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not 0 < len(value) <= NAME_LENGTH or not value.isascii():
        raise FrameError(f"the handshake's {field!r} has to be a text of 1 to {NAME_LENGTH} ASCII characters")
    return value


def _hex(body: Mapping[str, Any], field: str) -> bytes:
    value = body.get(field)
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if len(data) != NONCE_BYTES:
        raise FrameError(f"the handshake's {field!r} has to be {2 * NONCE_BYTES} hexadecimal digits")
    return data
