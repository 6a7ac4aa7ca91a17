"""The coordinator process: gives the machine ears, hands and a clock. It decides through the machine, trains nothing.

It holds no state that cannot be had again from the agents and the run directory, so it may die and come back, here or
at another host, while the workers train on. What the machine decides is done once a majority of the voters has it
(`ballot.py`); until it is elected it hears the agents and does nothing. Read next: `../commands/launch.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.cover import Damaged
from jaxscale.checkpoint.locations import Locations
from jaxscale.checkpoint.patience import STORAGE_SECONDS
from jaxscale.checkpoint.retention import Rules
from jaxscale.config import Config
from jaxscale.run_directory import RunDirectory
from jaxscale.supervisor import rpc
from jaxscale.supervisor.admission import check_shape, read_hello
from jaxscale.supervisor.ballot import WITNESS, Ballot, host_of
from jaxscale.supervisor.coordinator_options import CoordinatorOptions
from jaxscale.supervisor.facts import Action, Finish, Host, Hosts, Judge, Note, Start, Store, Tell
from jaxscale.supervisor.farewell import FAREWELL_SECONDS, Farewell
from jaxscale.supervisor.inventory import best_choice
from jaxscale.supervisor.journal import Journal
from jaxscale.supervisor.machine import Machine
from jaxscale.supervisor.quorum import Acceptor, AskAccept, QuorumError, Term
from jaxscale.supervisor.refusals import Refusals
from jaxscale.supervisor.rpc import Message, NameTaken, Refused, Server
from jaxscale.supervisor.run_settings import settings_of
from jaxscale.supervisor.states import DEPOSED
from jaxscale.supervisor.status_answer import status_answer
from jaxscale.supervisor.storekeeper import Storekeeper
from jaxscale.supervisor.voter import ask_to_json, reply_from_json
from jaxscale.supervisor.witness import Witness

TICK_SECONDS = 0.05
BEAT_SECONDS = 0.5
"""Agents that hear nothing for some of these look for another coordinator."""
ALARM_SECONDS = 3.0
INVITED_SECONDS = 1.5
AGAIN_SECONDS = 1.0
"""After which voters and hosts that did not answer are asked again."""

logger = logging.getLogger(__name__)


class Coordinator:
    """Runs in one event loop, until the run is done, stopped or given up."""

    def __init__(
        self,
        options: CoordinatorOptions,
        config: Config,
        judge: Judge,
        directory: RunDirectory,
        locations: Locations | None = None,
    ) -> None:
        self._options, self._config, self._directory = options, config, directory
        settings = settings_of(config, directory.checkpoints)
        if options.invite:  # hosts have heard nobody for some time: who can come to this one does so at once
            settings = dataclasses.replace(settings, adopt_seconds=INVITED_SECONDS)
        self.machine = Machine(settings, judge, self._source, directory.epoch - 1, time.monotonic())
        self._began = time.monotonic()
        self._ballot: Ballot[Action] = Ballot(f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
        self._journal, self._refusals, self._farewell = Journal(directory), Refusals(), Farewell(options.hosts)
        self._backlog: list[tuple[Callable[[], None], list[Exception]]] | None = []
        """What was heard before the election, and where errors of it go; None once it is won."""
        self._asked: dict[tuple[str, Term, int], float] = {}
        """When a voter was asked for a promise (-1) or a decision."""
        self._invited = self._beaten = 0.0
        self._unanswered_since, self._is_told, self._wants_end = self._began, False, False
        rules = Rules(config.checkpoint.keep, milestones=config.checkpoint.milestones)
        self._store = Storekeeper(directory.checkpoints, directory.metrics, rules, self._stored, locations)
        if locations is not None:
            locations.event, locations.lost = self._journal.post, self._lost
        self._tasks: set[asyncio.Task[None]] = set()
        self._sends: dict[str, asyncio.Queue[Mapping[str, Any]]] = {}
        self._voters: dict[str, str] = {}
        """Host -> name of its voter."""
        self._finish: Finish | None = None
        self._over = asyncio.Event()

    async def run(self) -> Finish:
        """Serves until the run is over. Raises OSError where it cannot listen."""
        self._loop = asyncio.get_running_loop()
        server = Server(self._options.token, self._session, self._ask, self._refused, self._options.tls)
        self._address = server.bind(self._options.listen)
        try:
            # Only now: a coordinator that cannot listen leaves nothing behind.
            self._witness = Witness(self._directory.path, self._options.job)
            self._ballot.meet(self._witness.acceptor)
            fields = {"pid": os.getpid(), "host": socket.gethostname(), "address": self._address}
            self._journal.event("coordinator_started", **fields)
            await server.serve()
            return await self._lead()
        finally:
            self._store.close(unused=self._directory.is_unused)
            await server.stop()
            self._journal.retry(at_once=True)

    async def _lead(self) -> Finish:
        ticking = asyncio.create_task(self._tick())
        try:
            over = asyncio.create_task(self._over.wait())
            done, _ = await asyncio.wait([ticking, over], return_when=asyncio.FIRST_COMPLETED)
            if ticking in done:
                ticking.result()
            assert self._finish is not None
            if self._finish.code != DEPOSED:
                await self._farewell.wait(self.machine.to_be_told, self.machine.hosts, self._sends)
                self._witness.delete()
                await self._copy_last()
        finally:
            ticking.cancel()
        return self._finish

    def not_audited(self, why: str) -> None:
        """Nobody can say on which meshes the model fits. May be called from any thread, at any time."""
        self._journal.post("alarm", what="no audit", detail=why)

    def drain(self, reason: str) -> None:
        """Asks the run to stop; called from the event loop."""
        self._wants_end = True
        self._hear(lambda: self.machine.drain(reason, time.monotonic()), [])

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            if self._backlog is None:
                self.machine.tick(now)
            elif now - self._began > self._options.elected_within:
                self._depose(f"no majority in {self._options.elected_within:g} s")
            self._perform()
            if now - self._beaten >= BEAT_SECONDS:
                self._beaten = now
                for orders in self._sends.values():
                    orders.put_nowait({"do": "beat", "leads": self._backlog is None and not self._is_told})
            self._check_votes(now)
            self._journal.retry()
            for line in self._refusals.due(now):
                self._alarm("connection refused", line)
            if now - self._invited >= AGAIN_SECONDS:
                self._invited = now
                self._invite()
            await asyncio.sleep(TICK_SECONDS)

    # Votes

    def _hear(self, tell: Callable[[], None], errors: list[Exception]) -> None:
        """Tells the machine, once this coordinator is elected; what it raises only then goes to `errors`."""
        if self._backlog is not None:
            self._backlog.append((tell, errors))
        else:
            tell()
        self._perform()

    def _vote(self) -> None:
        """Asks the voters what is open, and begins when it is elected."""
        now = time.monotonic()
        for _ in range(4):  # the witness answers at once, and each of its answers may open the next question
            asks = self._ballot.asks()
            if (ask := asks.get(WITNESS)) is None:
                break
            could, reply = self._witness.answer(ask)
            if not could:
                break
            if reply is None or not self._ballot.heard(reply):
                self._depose("the witness serves another one")
                return
        for voter, ask in self._ballot.asks().items():
            host, what = host_of(voter), ask.decision.sequence if isinstance(ask, AskAccept) else -1
            if self._voters.get(host) == voter and now - self._asked.get((voter, ask.term, what), 0.0) > AGAIN_SECONDS:
                self._asked[voter, ask.term, what] = now
                self._sends[host].put_nowait(ask_to_json(ask))
        if self._backlog is not None and self._ballot.leading:
            self._elected(now)

    def _check_votes(self, now: float) -> None:
        """Says so when no majority answers; gives up where the run is to be stopped anyway."""
        if not self._ballot.asks():
            self._unanswered_since, self._is_told = now, False
            return
        if self._ballot.is_succeeded(self._witness.vote()):
            self._depose("the witness has accepted a decision of another one")
            return
        waited, who = now - self._unanswered_since, ", ".join(self._ballot.missing)
        if waited > ALARM_SECONDS and not self._is_told:
            self._is_told = True
            self._alarm("no majority", f"nothing can be decided without an answer of {who}")
        if waited > FAREWELL_SECONDS and (self.machine.drain_reason or self._wants_end):
            self._finish = Finish(1, f"stopped, but no majority of the hosts could be told: {who} do not answer")
            self._over.set()

    def _elected(self, now: float) -> None:
        fields = {"term": list(self._ballot.term), "seconds": round(now - self._began, 3)}
        self._journal.event("elected", **fields)
        if self._ballot.value:
            self.machine.take_over(self._ballot.value, now)
        self._store.begin()
        backlog, self._backlog = self._backlog or [], None
        for tell, errors in backlog:
            try:
                tell()
            except Exception as error:  # what one agent says and makes no sense must harm no other
                logger.warning("heard before the election, and makes no sense: %r", error)
                errors.append(error)

    def _depose(self, reason: str) -> None:
        self._finish = Finish(DEPOSED, f"this coordinator ends: {reason}; the run goes on without it")
        self._over.set()

    def _invite(self) -> None:
        """Tells agents that know of another coordinator, or of none, about this one."""
        told = self._ballot.value.get("agents", {}) if self._ballot.leading else {}
        known = {address for host, address in told.items() if host not in self._sends}
        if self._backlog is not None:
            known |= set(self._options.invite)
        question = {"ask": "follow", "coordinator": self._address, "term": list(self._ballot.term)}
        for address in known:
            task = asyncio.ensure_future(self._invite_one(address, question | {"leads": self._ballot.leading}))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _invite_one(self, address: str, question: Message) -> None:
        with contextlib.suppress(rpc.Unreachable, Refused):
            await rpc.ask(address, self._options.token, question, AGAIN_SECONDS, self._options.tls)

    async def _copy_last(self) -> None:
        said: list[str] = []
        self._store.finish(STORAGE_SECONDS, said.append)
        while not said:
            await asyncio.sleep(TICK_SECONDS)
        if said[0] and self._finish is not None:
            self._alarm("copy failed", said[0])
            self._finish = Finish(self._finish.code or 1, "; ".join(filter(None, [self._finish.text, said[0]])))

    def _lost(self, error: Exception) -> None:
        """Called in a thread of the storekeeper: this process owns the run no more."""
        is_ours = getattr(error, "job", "") == self._options.owner
        end = self._depose if is_ours else lambda why: self._hear(lambda: self.machine.lost(why, time.monotonic()), [])
        with contextlib.suppress(RuntimeError):  # this coordinator has ended meanwhile
            self._loop.call_soon_threadsafe(end, str(error))

    def _perform(self) -> None:
        """Puts what the machine wants to the vote, and does what was voted for."""
        had_led = self._backlog is None
        if had_led:
            self._propose()
        self._vote()
        if not had_led and self._backlog is None:  # just elected: what the backlog made of it
            self._propose()
            self._vote()
        for action in self._ballot.release():
            match action:
                case Tell():
                    if action.host in self._sends:
                        self._sends[action.host].put_nowait(action.message)
                case Note():
                    self._directory.epoch = max(1, self.machine.number)
                    self._journal.event(action.kind, **action.fields)
                case Store():
                    self._store.do(action)
                case Finish():
                    self._finish = action
                    self._over.set()

    def _stored(self, what: Store, reason: str, size: int) -> None:
        """Called in the storekeeper's thread."""
        with contextlib.suppress(RuntimeError):  # this coordinator has ended meanwhile
            self._loop.call_soon_threadsafe(
                self._hear, lambda: self.machine.stored(what, reason, size, time.monotonic()), []
            )

    def _propose(self) -> None:
        actions, self.machine.actions = self.machine.actions, []
        epoch = self.machine.epoch
        self._ballot.hold(actions, self.machine.to_json(), epoch.world.members if epoch is not None else ())

    # Agents

    async def _session(self, incoming: AsyncIterator[Message], send: Callable[[Message], Awaitable[None]]) -> None:
        hello = await anext(incoming, None)
        if hello is None:
            return
        host, acceptor = self._admit(hello)
        orders: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self._sends[host.name] = orders
        self._voters[host.name] = acceptor.voter
        self._asked.clear()  # what was asked over another connection may not have arrived
        orders.put_nowait(
            {
                "do": "welcome",
                "recipe": self._options.recipe,
                "arguments": list(self._options.arguments),
                "run": str(self._directory.path),
                "replicas": self._config.memory.replicas,
                "command": list(self._options.command),
            }
        )
        writing = asyncio.create_task(self._write(orders, send))
        errors: list[Exception] = []
        try:
            self._ballot.meet(acceptor)
            self._hear(lambda: self.machine.hello(host, time.monotonic()), errors)
            fields = {"pid": host.pid, "host": host.name, "slice": host.slice}
            self._journal.event("agent_started", **fields)
            async for message in incoming:
                if errors:
                    raise errors[0]
                if "answer" in message:
                    self._answered(message)
                elif not self._farewell.heard(host.name, message, orders):
                    self._hear(functools.partial(self._tell, host.name, message), errors)
        finally:
            writing.cancel()
            if self._sends.get(host.name) is orders:
                del self._sends[host.name], self._voters[host.name]
                self._hear(lambda: self.machine.disconnected(host.name, time.monotonic()), errors)

    def _tell(self, host: str, message: Message) -> None:
        self.machine.message(host, message, time.monotonic())

    def _answered(self, message: Message) -> None:
        try:
            is_well = self._ballot.heard(reply_from_json(message))
        except QuorumError as error:
            raise Refused(str(error)) from error
        if is_well:
            self._perform()
        else:
            self._depose(f"{message['voter']} serves another one")

    async def _write(
        self, orders: asyncio.Queue[Mapping[str, Any]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        while True:
            await send({"term": list(self._ballot.term), **await orders.get()})

    def _admit(self, hello: Message) -> tuple[Host, Acceptor]:
        """Raises Refused for an agent that cannot take part."""
        host, acceptor, job = read_hello(hello)
        if job != self._options.job:
            raise Refused(f"agent {host.name} is of job {job}, this is job {self._options.job}")
        if self._options.request is not None:
            check_shape(host, self._options.request, self.machine.hosts)
        known = self.machine.hosts.get(host.name)
        if host.name in self._sends and known is not None and known.pid != host.pid:
            raise NameTaken(
                f"there is an agent called {host.name} already (pid {known.pid}, this is {host.pid}); "
                "give each host a name of its own"
            )
        return host, acceptor

    async def _ask(self, message: Message) -> Message:
        match message.get("ask"):
            case "status":
                return status_answer(self.machine, self._ballot)
            case "drain":
                self.drain(str(message.get("reason", "asked to")))
                return {"ok": True}
            case other:
                raise ValueError(f"a coordinator can be asked for status and drain, not for {other!r}")

    def _refused(self, peer: str, reason: str) -> None:
        if line := self._refusals.refused(peer, reason, time.monotonic()):
            logger.warning("refused %s", line)
            self._alarm("connection refused", line)

    def _alarm(self, what: str, detail: str) -> None:
        self._journal.event("alarm", what=what, detail=detail)

    # Where an epoch starts

    def _source(self, hosts: Hosts, lineage: Sequence[tuple[int, int]], damaged: Collection[Damaged]) -> Start:
        """The newest state that there is: in the hosts' memory, or in the durable tier."""
        durable = layout.newest_step(self._directory.checkpoints) or 0
        held = [(host.name, copy) for host in hosts.values() if host.is_connected for copy in host.copies]
        choice = best_choice(held, lineage, damaged)
        if choice is None or choice["step"] < durable:
            return durable, None
        return choice["step"], choice
