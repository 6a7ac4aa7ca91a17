"""Slots, servers and strangers for the tests of the peer transport. A slot here is a line of facts and random bytes."""

import contextlib
import hashlib
import json
import os
import socket
import threading
from dataclasses import dataclass

HEADER = 4096
JOB = "0123abcd"


@dataclass(frozen=True)
class Table:
    host: str
    epoch: int
    step: int


class Damaged(Exception):
    pass


def slot_bytes(host="host-0", epoch=1, step=1, nbytes=100_000, job=JOB):
    data = os.urandom(nbytes)
    facts = {"job": job, "host": host, "epoch": epoch, "step": step, "digest": hashlib.blake2b(data).hexdigest()}
    return json.dumps(facts).encode().ljust(HEADER, b"\0") + data


def verify(path, job):
    content = path.read_bytes()
    try:
        facts = json.loads(content[:HEADER].rstrip(b"\0"))
    except ValueError as error:
        raise Damaged(f"{path.name} has no header") from error
    if facts["job"] != job:
        raise Damaged(f"{path.name} is of another job")
    if hashlib.blake2b(content[HEADER:]).hexdigest() != facts["digest"]:
        raise Damaged(f"{path.name}: the digest of embed/table is wrong")
    return Table(facts["host"], facts["epoch"], facts["step"])


def write_slot(folder, generation=0, **facts):
    path = folder / "own" / f"gen-{generation}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(slot_bytes(**facts))
    return path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def stranger(address):
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def all_bytes(connection):
    """What comes until the other end closes, also where it does so by a reset."""
    found = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            found += piece
    return bytes(found)


class Recorder:
    """A proxy to `address` that keeps what the client of its one connection sends."""

    def __init__(self, address):
        self._target = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = bytearray()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        with self._listener, self._listener.accept()[0] as near, stranger(self._target) as far:
            back = threading.Thread(target=self._copy, args=(far, near, bytearray()))
            back.start()
            self._copy(near, far, self.sent)
            back.join()

    def _copy(self, source, target, kept):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                kept += piece
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def join(self):
        self._thread.join(10)
        assert not self._thread.is_alive()
