"""Streams a host's sealed memory slots to the agents that keep copies of them, in the background.

One thread per peer. Only the newest sealed step is worth sending: one that waits is replaced by a newer one. A peer
that fails again and again is left alone for a while (`retry.py`). Read next: `peer_client.py`, `commits.py` (what the
reports are for).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxscale.retry import BreakerOpen, Change, Retry
from jaxscale.supervisor.frames import FrameError
from jaxscale.supervisor.handshake import AuthenticationError
from jaxscale.supervisor.job_token import Token
from jaxscale.supervisor.peer_client import PeerClient
from jaxscale.supervisor.peers import PeerGone, PeerTimeout, PushResult, Stopped

PUSH_SECONDS = 60.0
ATTEMPTS = 3
RETRY_SECONDS = 5.0
"""A copy of an old step is worth little: the next one is on its way."""

logger = logging.getLogger(__name__)

Report = Callable[[int, int, str, str], None]
"""(epoch, step, holder, reason): reason is empty where the holder has a verified copy."""


@dataclass(frozen=True)
class Sealed:
    """A slot that was sealed."""

    epoch: int
    step: int
    path: Path
    generation: int


class Copier:
    """Pushes what `sealed` is given to every peer, until `stop`. One for each epoch."""

    def __init__(
        self,
        host: str,
        job: str,
        token: Token,
        peers: Mapping[str, str],
        epoch: int,
        report: Report,
        changed: Callable[[Change], None],
    ) -> None:
        """`peers`: host -> address of its slot server. `report` and `changed` (a breaker opened or closed) run in the
        copier's threads.
        """
        self._host, self._report, self._changed = host, report, changed
        self._epoch = epoch
        self._stop = threading.Event()
        self._waiting: dict[str, Sealed] = {}
        self._news = threading.Condition()
        self._threads = [
            threading.Thread(
                target=self._serve,
                args=(name, PeerClient(address, job, token, host)),
                name=f"copy-to-{name}",
                daemon=True,
            )
            for name, address in peers.items()
        ]
        self._peers = tuple(peers)
        for thread in self._threads:
            thread.start()

    def sealed(self, slot: Sealed) -> None:
        """Sends this slot next. One that was waiting will not be sent any more."""
        with self._news:
            passed_over = [(name, self._waiting[name]) for name in self._peers if name in self._waiting]
            self._waiting = dict.fromkeys(self._peers, slot)
            self._news.notify_all()
        for name, old in passed_over:
            self._report(old.epoch, old.step, name, "a newer step came before it was sent")

    def stop(self) -> None:
        """Gives up what is under way, at once. Returns without waiting for the threads."""
        self._stop.set()
        with self._news:
            self._waiting.clear()
            self._news.notify_all()

    def _serve(self, name: str, client: PeerClient) -> None:
        retry = Retry(f"slot server of {name}", changed=self._changed, sleep=self._sleep)
        with client:
            while (slot := self._next(name)) is not None:
                reason = self._push(client, slot, retry)
                if not self._stop.is_set():
                    self._report(slot.epoch, slot.step, name, reason)

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _next(self, name: str) -> Sealed | None:
        with self._news:
            self._news.wait_for(lambda: self._stop.is_set() or name in self._waiting)
            return None if self._stop.is_set() else self._waiting.pop(name)

    def _push(self, client: PeerClient, slot: Sealed, retry: Retry) -> str:
        """Why the peer has no copy; empty where it has one."""

        def push() -> PushResult:
            if self._stop.is_set():
                raise Stopped("this epoch is over")
            return client.push(
                slot.path,
                self._host,
                slot.generation,
                slot.epoch,
                slot.step,
                seconds=PUSH_SECONDS,
                sender_epoch=self._epoch,
                stop=self._stop,
            )

        try:
            result = retry.call(push, seconds=RETRY_SECONDS, attempts=ATTEMPTS)
        except (PeerGone, PeerTimeout, Stopped, AuthenticationError, FrameError, OSError, BreakerOpen) as error:
            return str(error)
        return "" if result.accepted else result.reason
