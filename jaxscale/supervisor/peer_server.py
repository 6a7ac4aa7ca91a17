"""The agent's peer server: parts of memory slots are fetched from it, copies of peers' slots are pushed to it.

One thread accepts, one a connection serves; the threads are bounded, and every wait has a deadline. A peer that cannot
prove that it has the job's token is refused before it can ask for anything. Requests on a connection, one at a time:

    fetch  {file, offset, nbytes}                                     -> DATA with the bytes
    push   {owner, generation, epoch, step, nbytes, sender_epoch}     -> REPLY {go}, then DATA from the peer
                                                                      -> REPLY {step, epoch}, once all digests are right
    ping   {}                                                         -> REPLY with what `status` gives

Any of them may be answered with REFUSAL {code, reason} (`peers.Code`). Read next: `peer_client.py`.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxscale.supervisor import frames, handshake
from jaxscale.supervisor.channel import Channel, Deadline
from jaxscale.supervisor.copies import CopyStore, Held
from jaxscale.supervisor.frames import Frame, FrameError, Kind
from jaxscale.supervisor.handshake import AuthenticationError, ServerHandshake, Session
from jaxscale.supervisor.job_token import Token
from jaxscale.supervisor.peers import (
    Announcement,
    Code,
    Operation,
    PeerGone,
    PeerTimeout,
    Refused,
    text,
    whole_number,
)
from jaxscale.supervisor.slot_files import opened_slot

CLOSE_SECONDS = 5.0
ANSWER_SECONDS = 2.0
PAUSE_SECONDS = 0.1
BROKEN = (PeerTimeout, PeerGone)


@dataclass(frozen=True)
class Limits:
    """How long and how many."""

    handshake_seconds: float = 5.0
    """For the whole handshake, so that a peer that trickles bytes gains nothing."""
    idle_seconds: float = 60.0
    """Between the requests of a connection; a client connects again by itself."""
    message_seconds: float = 5.0
    """For a request to arrive, from its first byte on."""
    operation_seconds: float = 600.0
    """For one fetch or push as a whole."""
    stall_seconds: float = 10.0
    """Without a single byte during a fetch or push."""
    connections: int = 32
    """At once. Above it, the oldest one that has not proved itself makes room, or the new one is refused as busy."""
    slot_nbytes: int = 1 << 40
    """Largest slot that may be announced."""


class CannotListen(OSError):
    """The address is taken, or not this host's. The message says which, and what to name instead."""

    def __str__(self) -> str:
        return str(self.strerror)


class _Guest:
    """A connection and the thread that serves it."""

    def __init__(self, channel: Channel, host: Callable[[_Guest], None]) -> None:
        self.channel = channel
        self.thread = threading.Thread(target=host, args=(self,), name=f"peer {channel.peer}", daemon=True)
        self.proved = False


class PeerServer:
    """Serves `folder` from its making until `close`. `address` is where; port 0 lets the kernel choose.

    The callbacks run in the server's threads: `refused(address, reason)` for every connection that was turned away,
    `received(owner, generation, held)` for every copy that came to exist, `status()` for the answer to a ping.
    """

    def __init__(
        self,
        folder: Path,
        job: str,
        token: Token,
        copies: CopyStore,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        status: Callable[[], Mapping[str, Any]] = dict,
        refused: Callable[[str, str], None] | None = None,
        received: Callable[[str, int, Held], None] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Raises CannotListen where the address cannot be had."""
        self._folder, self._job, self._token, self._copies = folder, job, token, copies
        self._status, self._on_refused, self._on_received = status, refused, received
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._guests: list[_Guest] = []
        self._closing = threading.Event()
        self._refusals = 0
        self._listener = _listen(host, port)
        name = self._listener.getsockname()
        self.address = _address(name)
        self._wake, self._waker = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name=f"peer-server {self.address}", daemon=True)
        self._acceptor.start()

    @property
    def refusals(self) -> int:
        """Connections that were turned away so far."""
        return self._refusals

    def close(self) -> None:
        """Ends all connections and threads, a push in its middle included, and gives the port back. May be repeated."""
        self._closing.set()
        self._waker.close()  # the acceptor sees the end of the other one
        if threading.current_thread() is not self._acceptor:
            self._acceptor.join(CLOSE_SECONDS)
        with self._lock:
            guests = list(self._guests)
        for guest in guests:
            guest.channel.shut()
        until = time.monotonic() + CLOSE_SECONDS
        for guest in guests:
            if guest.thread is not threading.current_thread():
                guest.thread.join(max(0.0, until - time.monotonic()))  # one may be checking digests

    def __enter__(self) -> PeerServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Connections

    def _accept(self) -> None:
        with self._listener, self._wake:
            poll = select.poll()
            poll.register(self._listener, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            while not self._closing.is_set():
                poll.poll()
                try:
                    connection, name = self._listener.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        self._count(self.address, f"no connection could be taken: {error.strerror}")
                        self._closing.wait(PAUSE_SECONDS)  # the queue stays readable: without a pause this would spin
                    continue
                self._admit(connection, _address(name))

    def _admit(self, connection: socket.socket, address: str) -> None:
        channel = Channel(connection, address, handshake.JSON_LIMIT)
        guest = _Guest(channel, self._host)
        if not self._has_room():
            self._turn_away(
                channel, Refused(Code.BUSY, f"{self._limits.connections} connections are open, no more fit")
            )
            channel.close()
            return
        with self._lock:
            self._guests.append(guest)
        try:
            guest.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            self._leave(guest)
            self._count(address, f"no thread for it: {error}")

    def _has_room(self) -> bool:
        with self._lock:
            if len(self._guests) < self._limits.connections:
                return True
            oldest = next((guest for guest in self._guests if not guest.proved), None)
        if oldest is None:
            return False
        oldest.channel.shut()
        oldest.thread.join(PAUSE_SECONDS * 10)
        return not oldest.thread.is_alive()

    def _host(self, guest: _Guest) -> None:
        channel = guest.channel
        try:
            session = self._authenticate(channel)
            if session is not None:
                guest.proved = True
                self._serve(channel)
        except FrameError as error:  # sealed by nobody, or the peer has the token and still makes no sense
            self._count(channel.peer, str(error))
        except (PeerTimeout, PeerGone):
            pass  # the peer sees by itself that the connection has ended
        finally:
            self._leave(guest)

    def _leave(self, guest: _Guest) -> None:
        with self._lock:
            self._guests.remove(guest)
        guest.channel.close()

    def _authenticate(self, channel: Channel) -> Session | None:
        deadline = Deadline.after(self._limits.handshake_seconds)
        server = ServerHandshake(self._job, self._token)
        try:
            channel.send_raw(server.challenge(channel.receive(deadline)), deadline)
            session = server.check(channel.receive(deadline))
            channel.authenticate(session.server_key, session.client_key, frames.JSON_LIMIT)
            channel.send(Kind.WELCOME, {}, deadline)
        except AuthenticationError as error:
            self._turn_away(channel, Refused(Code.UNAUTHENTICATED, str(error)))
        except FrameError as error:
            self._turn_away(channel, Refused(Code.MALFORMED, str(error)))
        except PeerTimeout:
            seconds = self._limits.handshake_seconds
            self._turn_away(channel, Refused(Code.UNAUTHENTICATED, f"the handshake was not done within {seconds:g} s"))
        except PeerGone as error:
            if not self._closing.is_set():
                self._count(channel.peer, f"it left before it had proved anything: {error}")
        else:
            return session
        return None

    def _turn_away(self, channel: Channel, refusal: Refused) -> None:
        self._count(channel.peer, refusal.reason)
        with contextlib.suppress(*BROKEN):
            # one attempt and no waiting: a stranger is owed nothing, and the acceptor has others to see to
            channel.send(Kind.REFUSAL, _body(refusal), Deadline.after(ANSWER_SECONDS, 0.0))

    def _count(self, address: str, reason: str) -> None:
        with self._lock:
            self._refusals += 1
        if self._on_refused is not None:
            self._on_refused(address, reason)

    # Requests

    def _serve(self, channel: Channel) -> None:
        limits = self._limits
        while not self._closing.is_set():
            idle = Deadline.after(limits.idle_seconds)
            request = channel.receive_or_end(Deadline.after(limits.message_seconds), idle=idle)
            if request is None:
                return
            try:
                self._answer(channel, request)
            except Refused as refusal:
                channel.send(Kind.REFUSAL, _body(refusal), Deadline.after(ANSWER_SECONDS))

    def _answer(self, channel: Channel, request: Frame) -> None:
        if request.kind is not Kind.REQUEST:
            raise FrameError(f"a {request.kind.name} frame came where a REQUEST belongs")
        body = request.body
        deadline = Deadline.after(self._limits.operation_seconds, self._limits.stall_seconds)
        match body.get("operation"):
            case Operation.FETCH:
                self._fetch(channel, body, deadline)
            case Operation.PUSH:
                self._push(channel, body, deadline)
            case Operation.PING:
                channel.send(Kind.REPLY, self._status(), deadline)
            case other:
                known = ", ".join(Operation)
                raise Refused(Code.MALFORMED, f"the operation {str(other)[:40]!a} is unknown; there are {known}")

    def _fetch(self, channel: Channel, body: Mapping[str, Any], deadline: Deadline) -> None:
        name, offset, nbytes = text(body, "file"), whole_number(body, "offset"), whole_number(body, "nbytes")
        with opened_slot(self._folder, name) as (descriptor, size):
            if offset + nbytes > size:
                raise Refused(
                    Code.MALFORMED, f"{name} has {size} bytes; asked for were {nbytes} bytes from byte {offset} on"
                )
            channel.send(Kind.DATA, {}, deadline, nbytes)
            with _file_error_ends(channel):
                channel.send_file(descriptor, offset, nbytes, deadline)

    def _push(self, channel: Channel, body: Mapping[str, Any], deadline: Deadline) -> None:
        numbers = {name: whole_number(body, name) for name in ("generation", "epoch", "step", "nbytes", "sender_epoch")}
        announced = Announcement(owner=text(body, "owner"), **numbers)
        if announced.nbytes > self._limits.slot_nbytes:
            raise Refused(
                Code.TOO_LARGE,
                f"a slot of {announced.nbytes} bytes is above this agent's limit of {self._limits.slot_nbytes} bytes",
            )
        place = self._copies.begin(announced)
        if isinstance(place, Held):
            channel.send(Kind.REPLY, {"go": False, "step": place.step, "epoch": place.epoch}, deadline)
            return
        with place:
            channel.send(Kind.REPLY, {"go": True}, deadline)
            data = channel.receive(deadline, announced.nbytes)
            if data.kind is not Kind.DATA or data.bulk_nbytes != announced.nbytes:
                raise FrameError(
                    f"a {data.kind.name} frame with {data.bulk_nbytes} bulk bytes came where {announced.nbytes} bytes "
                    "of a slot were announced"
                )
            try:
                channel.receive_file(place.descriptor, announced.nbytes, deadline)
            except (PeerTimeout, PeerGone):
                raise
            except OSError as error:
                # the rest of the slot is on its way: no request can follow on this connection
                with contextlib.suppress(*BROKEN):
                    channel.send(Kind.REFUSAL, _body(place.refusal(error)), Deadline.after(ANSWER_SECONDS))
                raise PeerGone(f"{channel.peer} was refused in the middle of a push") from error
            held = place.seal()
        if self._on_received is not None:
            self._on_received(announced.owner, announced.generation, held)
        channel.send(Kind.REPLY, {"step": held.step, "epoch": held.epoch}, deadline)


def _body(refusal: Refused) -> dict[str, Any]:
    return {"code": refusal.code, "reason": refusal.reason}


@contextlib.contextmanager
def _file_error_ends(channel: Channel) -> Iterator[None]:
    try:
        yield
    except (PeerTimeout, PeerGone):
        raise
    except OSError as error:
        raise PeerGone(f"the slot could not be read while it was sent to {channel.peer}: {error.strerror}") from error


def check_own(host: str) -> None:
    """Raises CannotListen where this is no address of this host."""
    _listen(host, 0).close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]  # Python adds the address to some of them
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            advice = f"{host} is no address of this host; name one of its own, `ip address` shows them"
        else:
            advice = "name another port, or 0 for any that is free"
        raise CannotListen(
            error.errno, f"the peer server cannot listen on port {port} of {host}: {why}; {advice}"
        ) from error
    listener.setblocking(False)
    return listener


def _address(name: tuple[Any, ...]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
