"""What both ends of the bulk transport between agents share: operations, refusals, results and errors.

An agent runs one `PeerServer` (`peer_server.py`) over its folder of memory slots. Other agents push copies of their
slots to it, and restoring workers fetch parts of slots from it, with a `PeerClient` (`peer_client.py`). It works on
plain sockets, so it also works when the world of workers is dead. The layers, from the wire up: `frames.py`,
`handshake.py`, `channel.py`; the files below it: `slot_files.py`, `copies.py`.
Read next: `frames.py`, or `peer_server.py` for the operations.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxscale.supervisor.frames import FrameError

AGENT = "agent"
WORKER = "worker"


class Operation(enum.StrEnum):
    """What a REQUEST frame may ask for."""

    FETCH = "fetch"
    PUSH = "push"
    PING = "ping"


class Code(enum.IntEnum):
    """Why something was refused; the numbers are HTTP's, so that `retry.py` knows which are worth another attempt."""

    MALFORMED = 400
    UNAUTHENTICATED = 401
    MISSING = 404
    OUTDATED = 409
    TOO_LARGE = 413
    DAMAGED = 422
    BUSY = 503
    NO_MEMORY = 507


class Refused(Exception):
    """The peer answered, and the answer is no. `code` is one of `Code` (or a later version's number)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = int(code)
        self.reason = reason


class PeerTimeout(TimeoutError):
    """The peer did not do its part in time. The message names it and says how far the operation got."""


class PeerGone(ConnectionError):
    """The peer cannot be reached, or the connection broke."""


class Stopped(RuntimeError):
    """The operation was given up because its `stop` was set."""


@dataclass(frozen=True)
class Announcement:
    """What a push says before the first byte of the slot."""

    owner: str
    """Host whose worker wrote the slot."""
    generation: int
    epoch: int
    """Epoch in the slot's header."""
    step: int
    nbytes: int
    sender_epoch: int
    """Epoch that the sender lives in; below the receiver's minimum epoch the sender is fenced. The slot's own epoch may
    be lower: after a host was lost, older slots are copied anew."""


@dataclass(frozen=True)
class PushResult:
    """How a push ended; a refusal is an ordinary end."""

    accepted: bool
    step: int = 0
    """Step and epoch that the peer now holds; 0 where it refused."""
    epoch: int = 0
    already_held: bool = False
    """The peer had this very slot, checked it, and took no byte."""
    code: int = 0
    reason: str = ""
    """Why it was refused."""


def whole_number(body: Mapping[str, Any], name: str) -> int:
    """A field of a message that has to be a whole number from 0 to 2^63-1. Raises Refused."""
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise Refused(Code.MALFORMED, f"the field {name!r} of a request has to be a whole number, 0 to 2^63-1")
    return value


def text(body: Mapping[str, Any], name: str) -> str:
    """A field of a message that has to be a text. Raises Refused."""
    value = body.get(name)
    if not isinstance(value, str):
        raise Refused(Code.MALFORMED, f"the field {name!r} of a request has to be a text")
    return value


def refusal_of(body: Mapping[str, Any]) -> Refused:
    """The refusal that a REFUSAL frame carries. Raises FrameError."""
    code, reason = body.get("code"), body.get("reason")
    if not isinstance(code, int) or not isinstance(reason, str):
        raise FrameError("a REFUSAL frame without a code and a reason")
    return Refused(code, reason)
