"""A connection with deadlines: frames, files and buffers over one socket. Every wait ends.

Bulk bytes never pass through Python's memory on their way between a file and the socket: `sendfile` on one side,
`splice` on the other (measured: 0.5 CPU-ms per MB for both ends together over loopback, 0.7 with recv and write, 1.0
with recv into a mapping, which besides kills the process when the file system is full). Read next: `peer_server.py`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxscale.supervisor.frames import Frame, FrameParser, FrameWriter, Kind
from jaxscale.supervisor.peers import PeerGone, PeerTimeout, Stopped
from jaxscale.supervisor.rate import TokenBucket

CHUNK = 4 << 20
PIPE_BYTES = 1 << 20
STOP_POLL_SECONDS = 0.02
UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENOTCONN}


@dataclass(frozen=True)
class Deadline:
    """When an operation has to be done, and how long the peer may be silent meanwhile."""

    at: float
    """On the monotonic clock."""
    seconds: float
    stall_seconds: float

    @staticmethod
    def after(seconds: float, stall_seconds: float | None = None) -> Deadline:
        return Deadline(time.monotonic() + seconds, seconds, seconds if stall_seconds is None else stall_seconds)


class Channel:
    """One end of a connection to `peer`. Used by one thread; `shut` may be called by another and ends what goes on.

    All methods raise PeerTimeout, PeerGone, Stopped (where `stop` was set) and FrameError; after any of these the
    connection is of no use.
    """

    def __init__(self, connection: socket.socket, peer: str, json_limit: int) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.peer = peer
        self.stop: threading.Event | None = None
        self._socket = connection
        self._writer = FrameWriter()
        self.parser = FrameParser(json_limit=json_limit)

    def authenticate(self, send_key: bytes, receive_key: bytes, json_limit: int) -> None:
        """From here on all frames are sealed."""
        self._writer.authenticate(send_key)
        self.parser.authenticate(receive_key)
        self.parser.json_limit = json_limit

    def reach(self, address: Any, deadline: Deadline) -> None:
        """Connects a fresh socket."""
        code = self._socket.connect_ex(address)
        while code in (errno.EINPROGRESS, errno.EALREADY):
            self._wait(select.POLLOUT, deadline, "taking the connection")
            if self.stop is not None and self.stop.is_set():
                raise Stopped(f"the exchange with {self.peer} was stopped")
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        # where nobody listens on a port that the kernel hands out, a socket may be connected to itself
        if not code and self._socket.getsockname() == self._socket.getpeername():
            code = errno.ECONNREFUSED
        if code:
            raise PeerGone(f"{self.peer} cannot be reached: {os.strerror(code)}")

    def send(self, kind: Kind, body: Mapping[str, Any], deadline: Deadline, bulk_nbytes: int = 0) -> None:
        """Sends a frame; its bulk bytes are to follow by `send_file`."""
        self.send_raw(self._writer.frame(kind, body, bulk_nbytes), deadline)

    def send_raw(self, data: bytes, deadline: Deadline) -> None:
        """Sends bytes as they are: the frames of the handshake."""
        rest = memoryview(data)
        while rest:
            part = rest
            sent = self._attempt(lambda: self._socket.send(part), select.POLLOUT, deadline, "taking a message")  # noqa: B023 - called at once
            rest = rest[sent:]

    def receive(self, deadline: Deadline, bulk_limit: int = 0) -> Frame:
        """The next frame. Its bulk bytes, if any, have to be taken by `receive_into` or `receive_file`."""
        frame = self.receive_or_end(deadline, bulk_limit)
        if frame is None:
            raise PeerGone(f"{self.peer} closed the connection instead of answering")
        return frame

    def receive_or_end(self, deadline: Deadline, bulk_limit: int = 0, idle: Deadline | None = None) -> Frame | None:
        """As `receive`; None where the peer has closed the connection after its last frame.

        `idle` is for the first byte; the rest of the frame then has the seconds of `deadline` from there on.
        """
        self.parser.bulk_limit = bulk_limit
        until = idle or deadline
        while True:
            wanted = self.parser.wanted
            data = self._attempt(lambda: self._socket.recv(wanted), select.POLLIN, until, "sending a message")  # noqa: B023 - called at once
            if not data:
                self.parser.end()
                return None
            if idle is not None and until is idle:
                until = Deadline.after(deadline.seconds, deadline.stall_seconds)
            for found in self.parser.feed(data):
                if isinstance(found, Frame):
                    return found

    def send_file(
        self, descriptor: int, offset: int, nbytes: int, deadline: Deadline, rate: TokenBucket | None = None
    ) -> None:
        """Sends a range of a file as bulk bytes. Raises PeerGone also where the file became shorter meanwhile."""
        chunk = CHUNK if rate is None else min(CHUNK, rate.burst)
        done = 0
        while done < nbytes:
            start, count = offset + done, min(chunk, nbytes - done)
            sent = self._attempt(
                lambda: os.sendfile(self._socket.fileno(), descriptor, start, count),  # noqa: B023 - called at once
                select.POLLOUT,
                deadline,
                f"taking {nbytes} bytes ({done} so far)",
            )
            if not sent:
                raise PeerGone(f"the file ended {nbytes - done} bytes early while it was sent to {self.peer}")
            done += sent
            if rate is not None:
                self._pause(rate.take(sent), deadline)

    def receive_into(self, into: memoryview, deadline: Deadline) -> None:
        """Fills `into` (bytes) with the next bulk bytes."""
        total = len(into)
        while into:
            part = into[:CHUNK]
            doing = f"sending {total} bytes ({total - len(into)} so far)"
            count = self._attempt(lambda: self._socket.recv_into(part), select.POLLIN, deadline, doing)  # noqa: B023 - called at once
            self._took(count, doing)
            into = into[count:]

    def receive_file(self, descriptor: int, nbytes: int, deadline: Deadline) -> None:
        """Writes the next `nbytes` bulk bytes to a file from its start. Raises OSError where it cannot be written."""
        with _pipe() as (outlet, inlet):
            done = 0
            while done < nbytes:
                doing = f"sending {nbytes} bytes ({done} so far)"
                left = min(PIPE_BYTES, nbytes - done)
                count = self._attempt(
                    lambda: os.splice(self._socket.fileno(), inlet, left),  # noqa: B023 - called at once
                    select.POLLIN,
                    deadline,
                    doing,
                )
                self._took(count, doing)
                while count:
                    written = os.splice(outlet, descriptor, count, offset_dst=done)
                    count -= written
                    done += written

    def closed_by_peer(self) -> bool:
        """Whether the peer has closed a connection on which nothing is under way."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def shut(self) -> None:
        """Ends the connection for both sides at once; whoever waits in this channel gets PeerGone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _took(self, count: int, doing: str) -> None:
        if not count:
            raise PeerGone(f"{self.peer} closed the connection while {doing}")
        self.parser.skip_bulk(count)

    def _attempt[T](self, action: Callable[[], T], event: int, deadline: Deadline, doing: str) -> T:
        while True:
            if self.stop is not None and self.stop.is_set():
                raise Stopped(f"the exchange with {self.peer} was stopped")
            if time.monotonic() >= deadline.at:
                raise PeerTimeout(f"{self.peer} was not done {doing} within {deadline.seconds:g} s")
            try:
                return action()
            except BlockingIOError:
                self._wait(event, deadline, doing)
            except OSError as error:
                if isinstance(error, ConnectionError | TimeoutError) or error.errno in UNREACHABLE:
                    raise PeerGone(f"the connection to {self.peer} broke while {doing}: {error.strerror}") from error
                raise  # of the file

    def _wait(self, event: int, deadline: Deadline, doing: str) -> None:
        stalled = time.monotonic() + deadline.stall_seconds
        poll = select.poll()
        poll.register(self._socket, event)
        while not (self.stop is not None and self.stop.is_set()):
            left = min(stalled, deadline.at) - time.monotonic()
            if left <= 0:
                seconds = min(deadline.stall_seconds, deadline.seconds)
                raise PeerTimeout(f"{self.peer} was silent for {seconds:g} s, or not done in time, while {doing}")
            if poll.poll(1000 * (left if self.stop is None else min(left, STOP_POLL_SECONDS))):
                return

    def _pause(self, seconds: float, deadline: Deadline) -> None:
        seconds = min(seconds, max(0.0, deadline.at - time.monotonic()))
        if seconds and self.stop is not None:
            self.stop.wait(seconds)
        elif seconds:
            time.sleep(seconds)


def connect(
    place: tuple[str, int], peer: str, json_limit: int, deadline: Deadline, stop: threading.Event | None
) -> Channel:
    """A connection to the listener at `place`. Raises PeerGone where nobody takes it, PeerTimeout, Stopped."""
    try:
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PeerGone(f"the address {peer} cannot be found: {error.strerror}") from error
    failure: PeerGone | None = None
    for family, kind, protocol, _, address in found:
        channel = Channel(socket.socket(family, kind, protocol), peer, json_limit)
        channel.stop = stop
        try:
            channel.reach(address, deadline)
        except PeerGone as error:
            failure = error
            channel.close()
        except BaseException:
            channel.close()
            raise
        else:
            return channel
    raise failure or PeerGone(f"the address {peer} has no host behind it")


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    outlet, inlet = os.pipe()
    try:
        with contextlib.suppress(OSError):  # a user above the limit for pipes keeps the size it has
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        yield outlet, inlet
    finally:
        os.close(outlet)
        os.close(inlet)
