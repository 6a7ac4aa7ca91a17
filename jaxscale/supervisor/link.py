"""An agent's tie to whoever coordinates: keeps it, votes, obeys no old one, and starts another when all are silent.

Training needs no coordinator, so nothing here disturbs a worker. Who is invited (`follow`) by a coordinator goes over
to it if it was elected, under a higher term or while its own leads no more, or if its own is silent. After
`takeover_after` seconds without a word this host starts a coordinator itself, hosts of a higher place in the list of
voters a little later; the votes decide whether it leads (`ballot.py`). Read next: `agent.py`, `coordinator.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxscale.retry import LINK_RETRY, pause
from jaxscale.supervisor.job_token import Token
from jaxscale.supervisor.orders import check
from jaxscale.supervisor.quorum import Acceptor, AskPromise, term_from_json
from jaxscale.supervisor.rpc import Message, NameTaken, Refused, Server, Session, Tls, Unreachable
from jaxscale.supervisor.voter import Voter, ask_from_json, refusal, reply_to_json

LOOK_SECONDS = 0.2
LASTED_SECONDS = 2.0
"""A tie that held for longer was one: the next attempt comes at once. A shorter one may break for the same reason."""
NAME_SECONDS = 10.0
"""How long another agent may have this one's name before that is an error."""
SILENT_SECONDS = 1.5
"""A coordinator that says nothing for so long cannot be reached: it has three words for everyone in that time."""
STAGGER_SECONDS = 0.5
"""The next voter of the list waits so much longer before it starts a coordinator too."""
ELECTION_SECONDS = 20.0
"""How long a coordinator that was started here may take to be elected."""
LEAVE_SECONDS = 10.0
FIRST_WORD_SECONDS, LAST_WORD_SECONDS = 5.0, 600.0
"""After so much silence it is told of; again each time that it has lasted twice as long, at most so much later."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinkOptions:
    """Where the coordinator was at first, and where this agent can be told of another one."""

    coordinator: str
    listen: str
    token: Token
    tls: Tls | None
    takeover_after: float
    """Seconds without a coordinator after which this host starts one; 0: never."""


def checked_address(address: str) -> str:
    """The address itself. Raises ValueError where it is not host:port."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        raise ValueError(f"an address is host:port, not {address[:80]!r}; a port is a number from 1 to 65535")
    return address


class Link:
    """Connects to one coordinator after the other. `say` never waits."""

    def __init__(
        self,
        options: LinkOptions,
        voter: Voter,
        hello: Callable[[], Message],
        obey: Callable[[Message], Awaitable[None]],
        refused: Callable[[str, str], None],
    ) -> None:
        """`hello`: what to say first; `obey`: called with each order, in turn; `refused`: address and reason of who was
        turned away at this agent's own port.
        """
        self._options, self._voter, self._hello, self._obey = options, voter, hello, obey
        self._addresses = [options.coordinator]
        self._session: Session | None = None
        self._heard = self._led = time.monotonic()
        self._trouble = "none of its addresses was tried yet"
        """Why there is no coordinator, as the last attempt found."""
        self._switch = asyncio.Event()
        self._command: list[str] = []
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._server = Server(options.token, self._no_session, self._asked, refused, options.tls)
        self.control = ""
        """Address of this agent's own server."""

    @property
    def acceptor(self) -> Acceptor:
        """What this host has promised and accepted."""
        return self._voter.acceptor

    @property
    def unled(self) -> float:
        """Seconds since a word of a coordinator that has a majority behind it."""
        return time.monotonic() - self._led

    @property
    def silence(self) -> float:
        """Seconds since a coordinator was heard of."""
        return time.monotonic() - self._heard

    @property
    def is_alone(self) -> bool:
        """Whether no coordinator is there at this moment."""
        return self._session is None or self.silence > SILENT_SECONDS

    def say(self, message: Mapping[str, Any]) -> None:
        """To the coordinator, if there is one; what it must know for sure is in the next hello."""
        if self._session is not None:
            self._session.send(message)

    async def start(self) -> None:
        """Listens. Raises OSError."""
        self.control = await self._server.start(f"{self._options.listen}:0")

    async def stay_connected(self) -> None:
        """Runs until it is cancelled. Raises Refused and NameTaken where another attempt would not help."""
        taken_since, failed = 0.0, 0
        while True:
            address, tied = self._addresses[0], 0.0
            self._switch.clear()
            try:
                async with Session(address, self._options.token, self._options.tls) as session:
                    session.send(self._hello())
                    while (message := await self._next(session)) is not None:
                        if not await self._take(session, message):
                            break
                        taken_since, tied = 0.0, tied or time.monotonic()
            except NameTaken as error:
                self._trouble = str(error)
                # Perhaps by this very host's agent before it died, or by a connection that broke without a sound.
                taken_since = taken_since or time.monotonic()
                if time.monotonic() - taken_since > NAME_SECONDS:
                    raise
            except Unreachable as error:
                self._trouble = str(error)
                logger.info("%s", error)
            finally:
                self._session = None
            if not self._switch.is_set():  # else there is a better one
                self._addresses.append(self._addresses.pop(0))
                failed = 1 if tied and time.monotonic() - tied > LASTED_SECONDS else failed + 1
                rounds = -(-failed // len(self._addresses))
                await self._pause(pause(LINK_RETRY, rounds, random.random()))

    async def _pause(self, seconds: float) -> None:
        """So long, or until there is a better coordinator to go to."""
        waits = [asyncio.ensure_future(self._switch.wait()), asyncio.ensure_future(asyncio.sleep(seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _next(self, session: Session) -> Message | None:
        """The next message; None when there is another coordinator to go to. Raises Unreachable and Refused."""
        receiving = asyncio.ensure_future(session.receive())
        switching = asyncio.ensure_future(self._switch.wait())
        try:
            done, _ = await asyncio.wait(
                [receiving, switching], timeout=SILENT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if receiving in done:
                return receiving.result()
            if switching in done:
                return None
            raise Unreachable(f"the coordinator at {self._addresses[0]} said nothing for {SILENT_SECONDS:g} s")
        finally:
            for task in (receiving, switching):
                task.cancel()
            await asyncio.gather(receiving, switching, return_exceptions=True)

    async def _take(self, session: Session, message: Message) -> bool:
        """Votes, or obeys. Whether to go on with this coordinator: not with one that serves an old term.

        Raises Unreachable for a message that cannot be read: no coordinator's mistake may end an agent and its worker.
        """
        try:
            do, term = str(message["do"]), term_from_json(message["term"])
            leads = bool(message["leads"]) if do == "beat" else False
            question = ask_from_json(message) if do in ("promise", "accept") else None
            if term < self._voter.acceptor.promised:
                session.send(reply_to_json(refusal(self._voter, term)))
                await session.flush()
                return False
            check(message)
            command = [str(word) for word in message["command"]] if do == "welcome" else []
        except (KeyError, TypeError, ValueError) as error:
            raise Unreachable(
                f"the coordinator at {self._addresses[0]} says {str(message)[:80]}, which cannot be read "
                f"({type(error).__name__}: {error}); perhaps it is of another version"
            ) from error
        if term > self._voter.acceptor.promised:
            try:
                self._voter.answer(AskPromise(term))  # after a word of this one, none of an older one counts
            except OSError as error:
                raise Unreachable(f"this host cannot write down whom it obeys ({error}), so it obeys nobody") from error
        self._heard = time.monotonic()
        if question is not None:
            with contextlib.suppress(OSError):  # what cannot be kept is not promised: one vote less
                if (reply := self._voter.answer(question)) is not None:
                    session.send(reply_to_json(reply))
        elif do == "beat":
            self._led = time.monotonic() if leads else self._led
        else:
            if do == "welcome":
                self._session, self._command = session, command
            try:
                await self._obey(message)
            except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
                logger.warning("an order to %s failed here", do, exc_info=True)  # it may as well be a mistake of ours
                raise Unreachable(
                    f"the order to {do} of the coordinator at {self._addresses[0]} cannot be obeyed: {error!r}"
                ) from error
        return True

    async def tell_silence(self) -> None:
        """Warns when no coordinator has been heard of for long, at growing intervals. Runs until it is cancelled."""
        due = FIRST_WORD_SECONDS
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            silence = self.silence
            if silence < SILENT_SECONDS and due > FIRST_WORD_SECONDS:
                logger.warning("a coordinator at %s is there", self._addresses[0])
                due = FIRST_WORD_SECONDS
            elif silence >= due:
                due = silence + min(silence, LAST_WORD_SECONDS)
                logger.warning(
                    "no coordinator at %s for %.0f s; a worker of this host trains on, but none is started; start the "
                    "coordinator, or if it is elsewhere end this agent (SIGTERM) and give --coordinator its address "
                    "(%s)",
                    " or ".join(self._addresses),
                    silence,
                    self._trouble,
                )

    # Another coordinator

    async def _no_session(self, _incoming: AsyncIterator[Message], _send: Callable[[Message], Awaitable[None]]) -> None:
        raise Refused("this is an agent, not a coordinator")

    async def _asked(self, message: Message) -> Message:
        """A coordinator invites. Raises ValueError for a question that is none."""
        if message.get("ask") != "follow":
            raise ValueError(f"an agent can be asked to follow, not {message.get('ask')!r}")
        try:
            address, term, leads = str(message["coordinator"]), term_from_json(message["term"]), bool(message["leads"])
        except KeyError as error:
            raise ValueError(f"an invitation lacks {error}") from error
        checked_address(address)
        has_one = self._session is not None and (self.unled if leads else self.silence) < SILENT_SECONDS
        is_newer = leads and term > self._voter.acceptor.promised
        if (address == self._addresses[0] and self._session is not None) or (has_one and not is_newer):
            return {"follows": self._addresses[0]}
        self._addresses = [address, *(other for other in self._addresses if other != address)][:3]
        self._switch.set()
        return {"follows": address}

    async def take_over(self) -> None:
        """Starts a coordinator when all have been silent for too long. Runs until it is cancelled."""
        patience = self._options.takeover_after
        if not patience:
            await asyncio.Event().wait()
        tried = 0.0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            vote, running = self._voter.acceptor.vote, self._coordinator
            if running is not None and running.poll() is not None:
                self._coordinator = running = None
                tried = time.monotonic()
            if running is not None or vote is None or not self._command:
                continue
            voters = vote.decision.voters
            name = self._voter.acceptor.voter
            place = voters.index(name) if name in voters else len(voters)
            waited = min(self.silence, time.monotonic() - tried)
            if waited > patience + place * STAGGER_SECONDS:
                self._start_coordinator(dict(vote.decision.value).get("agents", {}))

    def _start_coordinator(self, agents: Mapping[str, str]) -> None:
        # The first address is where the run's own coordinator was; agents are invited to this one.
        command = [sys.executable, "-m", "jaxscale", *self._command, "--listen", f"{self._options.listen}:0"]
        command += ["--elected-within", str(ELECTION_SECONDS)]
        if (tls := self._options.tls) is not None:  # the files of the host where the other one ran are not here
            command += ["--tls-key", str(tls.key), "--tls-certificate", str(tls.certificate)]
            command += ["--tls-authority", str(tls.authority)]
        for address in {self.control, *agents.values()}:
            command += ["--invite", address]
        logger.warning("no coordinator for %.1f s; this host starts one", self.silence)
        self._coordinator = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    async def close(self, waits: bool = True) -> None:
        """`waits`: for a coordinator that was started here; it ends when all agents have, and is ended if it stays."""
        self._session = None
        await self._server.stop()
        running = self._coordinator
        if running is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS if waits else 0.0):
                while running.poll() is None:
                    await asyncio.sleep(LOOK_SECONDS)
        if running.poll() is None:
            running.kill()
            running.wait()
