"""Control messages between coordinator and agents: one authenticated stream per agent, over gRPC.

An agent opens the stream and keeps it; both sides send JSON objects at any time. gRPC brings framing, flow control,
deadlines, keep-alive and TLS; what is ours is who may speak: the job's token travels in the metadata of each call and
is compared in constant time. Bulk data does not go here but over `peers.py`. Read next: `agent.py`, `coordinator.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]  # grpcio ships no types
import grpc.aio  # type: ignore[import-untyped]  # as above

from jaxscale.retry import LINK_RETRY
from jaxscale.supervisor.job_token import Token

SERVICE = "jaxscale.Supervisor"
SESSION = f"/{SERVICE}/Session"
ASK = f"/{SERVICE}/Ask"
VERSION = 1
"""Of the messages; an agent of another version is refused."""

MESSAGE_BYTES = 64 << 20
"""Largest message: an inventory of a large world's slots."""

OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.initial_reconnect_backoff_ms", round(LINK_RETRY.first_seconds * 1000)),
    ("grpc.max_reconnect_backoff_ms", round(LINK_RETRY.longest_seconds * 1000)),
)

HOW_TO_LISTEN = "choose another port (0: any) and an address of this machine with --listen"

Message = dict[str, Any]


@dataclass(frozen=True)
class Tls:
    """Files of one side, PEM: its key and certificate, and the authority that signed the other's."""

    key: Path
    certificate: Path
    authority: Path


class Refused(RuntimeError):
    """The other side does not want to speak with this one: wrong token, version or name. Trying again is no use."""


class Unreachable(ConnectionError):
    """The other side does not answer, or the connection broke."""


class CannotListen(OSError):
    """The address is taken, or not this machine's."""


class NameTaken(RuntimeError):
    """Another agent is connected under this name."""


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=str, allow_nan=True).encode()


def decode(data: bytes) -> Message:
    """Raises ValueError for anything that is no JSON object."""
    try:
        message = json.loads(data)
    except RecursionError as error:
        raise ValueError("a message is not nested so deeply") from error
    if not isinstance(message, dict):
        raise ValueError(f"a message is a JSON object, this one a {type(message).__name__}")
    return message


class Server:
    """The coordinator's side. `session(hello, incoming, send)` runs for each agent; `ask(message)` answers a client."""

    def __init__(
        self,
        token: Token,
        session: Callable[[AsyncIterator[Message], Callable[[Message], Awaitable[None]]], Awaitable[None]],
        ask: Callable[[Message], Awaitable[Message]],
        refused: Callable[[str, str], None],
        tls: Tls | None = None,
    ) -> None:
        self._token, self._session, self._ask, self._refused = token, session, ask, refused
        self._tls = tls
        self._server: Any = None

    async def start(self, address: str) -> str:
        """Binds, and serves at once. Raises OSError."""
        bound = self.bind(address)
        await self.serve()
        return bound

    def bind(self, address: str) -> str:
        """Holds `host:port` (port 0: the kernel chooses) and returns the address; nobody is heard before `serve`.

        Raises OSError.
        """
        check_free(address)
        self._server = grpc.aio.server(options=OPTIONS)
        handlers = {
            "Session": grpc.stream_stream_rpc_method_handler(self._handle_session, bytes, bytes),
            "Ask": grpc.unary_unary_rpc_method_handler(self._handle_ask, bytes, bytes),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, _server_credentials(self._tls))
        except RuntimeError as error:
            advice = HOW_TO_LISTEN
            if self._tls is not None:
                advice += (
                    f"; or {self._tls.key}, {self._tls.certificate} and {self._tls.authority} are not what they say"
                )
            raise CannotListen(f"cannot listen on {address}; {advice}") from error
        return f"{address.rpartition(':')[0]}:{port}"

    async def serve(self) -> None:
        """From here on who connects is heard."""
        await self._server.start()

    async def stop(self, grace_seconds: float = 0.5) -> None:
        if self._server is not None:
            # A traceback for each stream that is still open would be logged; they are cut on purpose.
            logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
            await self._server.stop(grace_seconds)

    async def _handle_session(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await self._check(context)

        async def incoming() -> AsyncIterator[Message]:
            async for data in requests:
                try:
                    yield decode(data)
                except ValueError as error:
                    self._refused(context.peer(), f"not a message: {error}")
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

        async def send(message: Message) -> None:
            await context.write(encode(message))

        try:
            await self._session(incoming(), send)
        except Refused as error:
            self._refused(context.peer(), str(error))
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except NameTaken as error:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))

    async def _handle_ask(self, request: bytes, context: Any) -> bytes:
        await self._check(context)
        try:
            return encode(await self._ask(decode(request)))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise

    async def _check(self, context: Any) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not hmac.compare_digest(str(given).encode(), _bearer(self._token).encode()):
            self._refused(context.peer(), "wrong or missing token")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not this job's")


def check_free(address: str) -> None:
    """Raises CannotListen where nobody can listen on `host:port` now, and says why.

    gRPC would say on standard error, in words of its own, what it found, and tell us only that it failed.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise CannotListen(f"cannot listen on {address!r}; give host:port with a port of 0 (any) to 65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: a port just left is free
            probe.bind(place)
            probe.listen()
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another process listens there",
            errno.EADDRNOTAVAIL: "it is no address of this machine",
        }.get(error.errno or 0, error.strerror)
        raise CannotListen(f"cannot listen on {address}: {why}; {HOW_TO_LISTEN}") from error


class Session:
    """The agent's side of the stream. Use in `async with`; `send` never waits, `receive` does."""

    def __init__(self, address: str, token: Token, tls: Tls | None = None) -> None:
        self._address, self._token, self._tls = address, token, tls

    async def __aenter__(self) -> Session:
        self._channel = channel(self._address, self._tls)
        call = self._channel.stream_stream(SESSION, request_serializer=bytes, response_deserializer=bytes)
        self._call = call(metadata=_metadata(self._token))
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._writer = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.cancel()
        self._call.cancel()
        await self._channel.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Puts a message on its way, in order. When the connection breaks `receive` says so."""
        self._queue.put_nowait(encode(message))

    async def flush(self, seconds: float = 1.0) -> None:
        """Waits until everything is on its way, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), seconds)

    async def _write(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._queue.get())
                self._queue.task_done()

    async def receive(self) -> Message | None:
        """The next message; None when the other side ended the stream. Raises Unreachable and Refused."""
        try:
            data = await self._call.read()
        except grpc.RpcError as error:
            raise translate(error, self._address, self._tls) from error
        if data is grpc.aio.EOF:
            code = await self._call.code()
            if code != grpc.StatusCode.OK:
                raise _translated(code, await self._call.details(), self._address, self._tls)
            return None
        try:
            return decode(data)
        except ValueError as error:
            raise Unreachable(f"{self._address} says what is no message: {error}") from error


async def ask(
    address: str, token: Token, message: Mapping[str, Any], seconds: float = 5.0, tls: Tls | None = None
) -> Message:
    """One question to a coordinator. Raises Unreachable and Refused."""
    async with channel(address, tls) as open_channel:
        call = open_channel.unary_unary(ASK, request_serializer=bytes, response_deserializer=bytes)
        try:
            return decode(await call(encode(message), timeout=seconds, metadata=_metadata(token)))
        except grpc.RpcError as error:
            raise translate(error, address, tls) from error


def channel(address: str, tls: Tls | None) -> Any:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        tls.authority.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()
    )
    return grpc.aio.secure_channel(address, credentials, options=OPTIONS)


def translate(error: Any, address: str, tls: Tls | None) -> Exception:
    """A gRPC error as Refused (no use trying again) or Unreachable."""
    return _translated(error.code(), error.details(), address, tls)


def _translated(code: Any, details: str, address: str, tls: Tls | None) -> Exception:
    final = (
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    )
    if code == grpc.StatusCode.ALREADY_EXISTS:
        return NameTaken(details)
    if code in final:
        return Refused(f"the coordinator at {address} refuses: {details}")
    name = code.name if code is not None else "no status"
    # "Socket closed" is all that gRPC says where one side speaks TLS and the other does not, or does not believe it.
    how = "without TLS" if tls is None else f"with TLS, {tls.certificate} and {tls.authority}"
    return Unreachable(f"the coordinator at {address} cannot be reached {how} ({name}: {details})")


def _metadata(token: Token) -> tuple[tuple[str, str], ...]:
    return (("authorization", _bearer(token)),)


def _bearer(token: Token) -> str:
    """The token as the metadata carries it; TLS keeps it from the wire's listeners, as `docs/supervisor.md` says."""
    return f"Bearer {token.secret.hex()}"


def _server_credentials(tls: Tls) -> Any:
    pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], tls.authority.read_bytes(), require_client_auth=True)
