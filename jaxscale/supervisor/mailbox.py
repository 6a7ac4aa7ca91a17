"""Words from a worker to its agent, over a datagram socket: sealed slots, errors, the end. Both ends of it.

Read next: `worker_process.py`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscale.supervisor.records import MAILBOX

MAIL_BYTES = 1 << 17

FULL_SECONDS = 0.5
"""How long a worker waits for an agent whose mailbox is full."""
AGAIN_SECONDS = 0.01

logger = logging.getLogger(__name__)


class Letters:
    """The agent's end. `fileno` becomes readable when there is a word to read."""

    def __init__(self, folder: Path) -> None:
        (folder / MAILBOX).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.bind(str(folder / MAILBOX))

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(kind, fields) of each word that has come. What is no word of a worker is left out."""
        while True:
            try:
                data = self._socket.recv(MAIL_BYTES)
            except BlockingIOError:
                return
            try:
                message = json.loads(data)
                kind = message.pop("kind")
                if kind == "slot_sealed":
                    int(str(message["file"]).removeprefix("gen-")), int(message["step"]), int(message["epoch"])
                elif kind in ("error", "finished"):
                    int(message["pid"])
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("a message that is none came into the mailbox: %r", data[:100])
                continue
            yield str(kind), message

    def close(self) -> None:
        self._socket.close()


class Mailbox:
    """Sends JSON objects. An agent that is away for a moment must not stop the training."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self._path, self._epoch = str(folder / MAILBOX), epoch
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._patience = FULL_SECONDS

    def say(self, kind: str, fields: Mapping[str, Any]) -> None:
        """May be called from any thread.

        The kernel keeps ten words for an agent that is busy; then this waits, but not again for one that took none.
        """
        message = {"kind": kind, "epoch": self._epoch, "pid": os.getpid(), **fields}
        data = json.dumps(message, default=str).encode()
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self._socket.sendto(data, self._path)
                self._patience = FULL_SECONDS
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    if self._patience:
                        logger.warning("the agent takes no words; %r is the first that it misses", kind)
                    self._patience = 0.0
                    return
                time.sleep(AGAIN_SECONDS)
            except OSError as error:  # no agent just now: exit codes and records remain
                logger.info("the agent did not hear %r: %s", kind, error)
                return
