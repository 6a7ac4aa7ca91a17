"""Notices at once that a process of the world has died: each holds a plain TCP connection to process 0.

JAX's own client would notice too, and answer the death of process 0 with a stack dump and SIGABRT within some
milliseconds; for the others its heartbeat takes 100 seconds. Where a firewall lets the connection not through, that is
what is left. Read next: `world.py`, which decides what a death means.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from typing import Any

CONNECT_SECONDS = 3.0
GRACE_SECONDS = 10.0
"""How long process 0 waits for one whose connection ended: its own thread may be about to tell a better reason."""
STAYS_SECONDS = 1.0
"""A connection that lasts this long is one to a living process."""
GONE_TRIES = 20
POLL_SECONDS = 0.05
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""A host that lost its power closes nothing: 25 seconds without an answer end the connection."""


def listen(lost: Callable[[int], None]) -> str:
    """Process 0: listens on a port that the kernel chooses, and returns what `watch` has to know.

    lost: called, in a thread of its own, with the index of each process whose connection stays away for GRACE_SECONDS.
    """
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", 0), backlog=1024)
    token = secrets.token_hex(16)
    threading.Thread(target=_serve, args=(listener, token, lost), name="watch-others", daemon=True).start()
    return json.dumps({"port": listener.getsockname()[1], "token": token})


def watch(host: str, told: str, index: int, lost: Callable[[], None]) -> Callable[[], bool]:
    """Another process: holds a connection to process 0 at `host`, `told` being what `listen` returned.

    lost: called, in a thread, when the connection has ended and process 0 takes no new one. Returns a function that
    says within STAYS_SECONDS whether process 0 is gone. Where no connection can be made from the start, nothing is
    ever lost.
    """
    found = json.loads(told)
    address = (host.strip("[]"), found["port"])
    hello = f"{found['token']} {index}\n".encode()
    connection = _connect(address, hello)
    if connection is None:
        return lambda: False
    threading.Thread(target=_follow, args=(connection, address, hello, lost), name="watch-0", daemon=True).start()

    def is_gone() -> bool:
        # A process that was killed closes its files one by one: for some milliseconds it may still take a connection.
        for _ in range(GONE_TRIES):
            again = _connect(address, hello)
            if again is None:
                return True
            with again:
                again.settimeout(STAYS_SECONDS)
                try:
                    again.recv(64)
                except TimeoutError:
                    return False
                except OSError:
                    pass
            time.sleep(POLL_SECONDS)
        return True

    return is_gone


def on_abort(action: Callable[[], None]) -> Callable[[], None]:
    """Calls `action` when native code aborts this process (SIGABRT); returns a function that undoes this.

    When the action returns, the process ends as it would have. A handler of Python's own would come too late: it runs
    in the main thread once that is back in Python, and `abort` returns to nobody.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _handlers.append(handler)
    return lambda: libc.signal(signal.SIGABRT, before)


def is_collective(error: BaseException) -> bool:
    """Whether this error says no more than that another process is gone: that one's own error is the one to read."""
    text = str(error)
    return any(mark in text for mark in ("Gloo", "gloo", "NCCL", "Connection reset", "Connection closed by peer"))


def native_words(limit: int = 8192) -> str:
    """The end of what was written to stderr, where that is a file, as it is of native code in a world of several."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(2).st_mode):
            with open("/proc/self/fd/2", "rb") as file:
                file.seek(max(0, os.fstat(2).st_size - limit))
                return file.read().decode(errors="replace")
    return ""


_handlers: list[Any] = []
"""What C may still call must not be freed."""


def _connect(address: tuple[str, int], hello: bytes) -> socket.socket | None:
    try:
        connection = socket.create_connection(address, CONNECT_SECONDS)
        connection.sendall(hello)
    except OSError:
        return None
    connection.settimeout(None)
    _keep_alive(connection)
    return connection


def _follow(connection: socket.socket, address: tuple[str, int], hello: bytes, lost: Callable[[], None]) -> None:
    current: socket.socket | None = connection
    while current is not None:
        with contextlib.suppress(OSError), current:
            while current.recv(64):
                pass
        current = _connect(address, hello)  # something on the way may have cut it
    lost()


def _serve(listener: socket.socket, token: str, lost: Callable[[int], None]) -> None:
    here: dict[int, socket.socket] = {}
    """The connection of each process."""
    missing: dict[int, float] = {}
    """When a process whose connection ended is lost. No timer threads: Python may be ending, and then starts none."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(min(missing.values()) - time.monotonic() if missing else None):
                if key.fileobj is listener:
                    with contextlib.suppress(OSError):
                        connection, _ = listener.accept()
                        connection.setblocking(False)
                        _keep_alive(connection)
                        selector.register(connection, selectors.EVENT_READ, None)
                    continue
                connection, index = key.fileobj, key.data  # type: ignore[assignment]  # all but the listener are sockets
                data = _received(connection)
                if index is None and data.startswith(f"{token} ".encode()) and data.endswith(b"\n"):
                    index = int(data.split()[1])
                    here[index] = connection
                    missing.pop(index, None)
                    selector.modify(connection, selectors.EVENT_READ, index)
                elif not data or index is None:  # ended, or a stranger
                    selector.unregister(connection)
                    connection.close()
                    if index is not None and here.get(index) is connection:
                        del here[index]
                        missing[index] = time.monotonic() + GRACE_SECONDS
            for index in [index for index, end in missing.items() if end <= time.monotonic()]:
                del missing[index]
                lost(index)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(256)
    except BlockingIOError:
        return b" "
    except OSError:
        return b""


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
