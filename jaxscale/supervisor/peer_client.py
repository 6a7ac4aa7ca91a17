"""The other end of the peer server: fetches parts of slots, pushes whole slots, asks how the peer is.

Read next: `copies.py` for what the peer does with a push, `checkpoint/slot.py` for what is in a slot.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxscale.supervisor import frames
from jaxscale.supervisor.channel import Channel, Deadline, connect
from jaxscale.supervisor.frames import Frame, FrameError, Kind
from jaxscale.supervisor.handshake import AuthenticationError, ClientHandshake
from jaxscale.supervisor.job_token import Token
from jaxscale.supervisor.peers import (
    AGENT,
    Code,
    Operation,
    PeerGone,
    PeerTimeout,
    PushResult,
    Refused,
    refusal_of,
    whole_number,
)
from jaxscale.supervisor.rate import TokenBucket

CONNECT_SECONDS = 5.0
LAST_WORD_SECONDS = 0.5


class PeerClient:
    """Talks to the peer server at `address` (host:port). Connects when first used, and again after the peer closed.

    One operation at a time: a second thread waits. Every operation ends within its `seconds`, and raises PeerTimeout,
    PeerGone (both worth another attempt), Refused (its code says), AuthenticationError, FrameError.
    """

    def __init__(self, address: str, job: str, token: Token, name: str, role: str = AGENT) -> None:
        """`name` is this host's, for the peer's messages. Raises ValueError for what is no address."""
        self.address = address
        self._place = _split(address)
        self._job, self._token, self._name, self._role = job, token, name, role
        self._lock = threading.Lock()
        self._channel: Channel | None = None

    def fetch(self, file: str, offset: int, nbytes: int, *, seconds: float, into: Any = None) -> memoryview:
        """Bytes `offset` to `offset + nbytes` of a slot such as `own/gen-0`, as they are there now: check their digest.

        `into`: a writable buffer of `nbytes` bytes that is to take them; without it one is made.
        """
        view = memoryview(bytearray(nbytes) if into is None else into).cast("B")
        if len(view) != nbytes:
            raise ValueError(f"a buffer of {len(view)} bytes cannot take {nbytes} bytes of {file}")
        body = {"operation": Operation.FETCH, "file": file, "offset": offset, "nbytes": nbytes}
        with self._exchange(seconds, None) as (channel, deadline):
            channel.send(Kind.REQUEST, body, deadline)
            _expect(channel.receive(deadline, nbytes), Kind.DATA, nbytes)
            channel.receive_into(view, deadline)
        return view

    def push(
        self,
        path: Path,
        owner: str,
        generation: int,
        epoch: int,
        step: int,
        *,
        seconds: float,
        sender_epoch: int | None = None,
        rate: TokenBucket | None = None,
        stop: threading.Event | None = None,
    ) -> PushResult:
        """Copies the slot in `path`, which `owner` wrote at `step` of `epoch`, to the peer, and waits for its verdict.

        The worker may overwrite the slot meanwhile: the peer then finds wrong digests and refuses. `sender_epoch` is
        the epoch that this agent lives in; None: `epoch`. `rate` caps the bytes a second; `stop` gives up at once.
        Raises, besides what all operations raise, Stopped, and OSError where `path` cannot be read.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path} is no plain file, so it is no slot")
            nbytes = status.st_size
            body = {
                "operation": Operation.PUSH,
                "owner": owner,
                "generation": generation,
                "epoch": epoch,
                "step": step,
                "nbytes": nbytes,
                "sender_epoch": epoch if sender_epoch is None else sender_epoch,
            }
            try:
                with self._exchange(seconds, stop) as (channel, deadline):
                    channel.send(Kind.REQUEST, body, deadline)
                    answer = _expect(channel.receive(deadline), Kind.REPLY).body
                    if go := answer.get("go") is True:
                        self._send_slot(channel, descriptor, nbytes, deadline, rate)
                        answer = _expect(channel.receive(deadline), Kind.REPLY).body
                    step, epoch = whole_number(answer, "step"), whole_number(answer, "epoch")
            except Refused as refusal:
                return PushResult(False, code=refusal.code, reason=f"{self.address}: {refusal.reason}")
        finally:
            os.close(descriptor)
        return PushResult(True, step, epoch, already_held=not go)

    def ping(self, *, seconds: float) -> dict[str, Any]:
        """What the peer says of itself."""
        with self._exchange(seconds, None) as (channel, deadline):
            channel.send(Kind.REQUEST, {"operation": Operation.PING}, deadline)
            return dict(_expect(channel.receive(deadline), Kind.REPLY).body)

    def close(self) -> None:
        """Ends the connection and what another thread does on it. The next use connects again."""
        channel = self._channel
        if channel is not None:
            channel.shut()
        with self._lock:
            self._drop()

    def __enter__(self) -> PeerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _exchange(self, seconds: float, stop: threading.Event | None) -> Iterator[tuple[Channel, Deadline]]:
        """A connection that has been authenticated. It is kept if the exchange ends well or with a refusal."""
        deadline = Deadline.after(seconds)
        if not self._lock.acquire(timeout=seconds):
            raise PeerTimeout(
                f"{self.address}: another operation of this process held the connection for {seconds:g} s"
            )
        try:
            channel = self._channel
            if channel is not None and channel.closed_by_peer():
                self._drop()
                channel = None
            if channel is None:
                channel = self._connect(deadline, stop)
            channel.stop = stop
            yield channel, deadline
        except Refused:
            raise  # a whole answer: the connection is in order
        except BaseException:
            self._drop()
            raise
        finally:
            self._lock.release()

    def _connect(self, deadline: Deadline, stop: threading.Event | None) -> Channel:
        until = Deadline.after(max(0.0, min(CONNECT_SECONDS, deadline.at - time.monotonic())))
        channel = connect(self._place, self.address, frames.JSON_LIMIT, until, stop)
        self._channel = channel  # from here on `close` can end what goes on
        try:
            self._authenticate(channel, deadline)
        except BaseException:
            self._drop()
            raise
        return channel

    def _authenticate(self, channel: Channel, deadline: Deadline) -> None:
        client = ClientHandshake(self._job, self._token, self._name, self._role)
        try:
            channel.send_raw(client.hello(), deadline)
            proof, session = client.prove(_expect(channel.receive(deadline), Kind.CHALLENGE))
            channel.send_raw(proof, deadline)
            channel.authenticate(session.client_key, session.server_key, frames.JSON_LIMIT)
            _expect(channel.receive(deadline), Kind.WELCOME)
        except Refused as refusal:
            if refusal.code == Code.UNAUTHENTICATED:
                raise AuthenticationError(f"{self.address} refused this connection: {refusal.reason}") from None
            raise
        except AuthenticationError as error:
            raise AuthenticationError(f"{self.address}: {error}") from None

    def _send_slot(
        self, channel: Channel, descriptor: int, nbytes: int, deadline: Deadline, rate: TokenBucket | None
    ) -> None:
        try:
            channel.send(Kind.DATA, {}, deadline, nbytes)
            channel.send_file(descriptor, 0, nbytes, deadline, rate)
        except PeerGone:
            # a peer that runs out of memory says so and then closes: that tells more than the broken connection
            with contextlib.suppress(PeerGone, PeerTimeout, FrameError):
                _expect(channel.receive(Deadline.after(LAST_WORD_SECONDS)), Kind.REPLY)
            raise

    def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


def _expect(frame: Frame, kind: Kind, bulk_nbytes: int = 0) -> Frame:
    if frame.kind is Kind.REFUSAL:
        raise refusal_of(frame.body)
    if frame.kind is not kind or frame.bulk_nbytes != bulk_nbytes:
        raise FrameError(
            f"a {frame.kind.name} frame with {frame.bulk_nbytes} bulk bytes came where {kind.name} with "
            f"{bulk_nbytes} belongs"
        )
    return frame


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no address of a peer server; it has to be host:port, such as 10.0.0.1:8470")
    return host.removeprefix("[").removesuffix("]"), int(port)
