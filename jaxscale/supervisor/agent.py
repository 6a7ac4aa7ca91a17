"""The agent: one per host, never imports JAX; owns the host's memory slots, its lease and the pids of its children.

It does what the coordinator says (serve, work, fence, drain) and tells it what it sees (exits, hangs, errors, sealed
slots). It decides nothing about the world, except to end its own worker when it is told nothing for too long. While no
coordinator is there, training goes on. Read next: `machine.py`, the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscale.cache import cache_folder
from jaxscale.checkpoint.slot import verify
from jaxscale.retry import Change
from jaxscale.supervisor.agent_options import AgentOptions
from jaxscale.supervisor.children import Child, Exit, ZygoteFailed, become_subreaper
from jaxscale.supervisor.copier import Copier, Sealed
from jaxscale.supervisor.copies import CopyStore
from jaxscale.supervisor.departure import Departure
from jaxscale.supervisor.estate import Estate, Heir, heir_of, read_estate
from jaxscale.supervisor.farewell import ENDED
from jaxscale.supervisor.host_folder import HostFolder
from jaxscale.supervisor.inventory import COPIES, OWN, scan
from jaxscale.supervisor.jobs import WorkerJob
from jaxscale.supervisor.link import Link, LinkOptions
from jaxscale.supervisor.mailbox import Letters
from jaxscale.supervisor.maintenance import notice
from jaxscale.supervisor.peer_server import PeerServer
from jaxscale.supervisor.persister_keeper import PersisterKeeper
from jaxscale.supervisor.records import VERDICTS, VerdictRecord, Verdicts
from jaxscale.supervisor.rpc import VERSION
from jaxscale.supervisor.voter import host_voter
from jaxscale.supervisor.worker_view import WorkerView
from jaxscale.supervisor.zygote import ForkError
from jaxscale.supervisor.zygote_keeper import ZygoteKeeper
from jaxscale.train.protocols import ExitReason

STOP_SIGNALS = {"drain": signal.SIGINT, "handover": signal.SIGUSR2}
"""How a worker is told to save and end; SIGTERM is the cloud's, and means that the host is to end."""

HEARTBEAT_SECONDS = 0.2
LAST_WORD_SECONDS = 1.0
"""How long the answer to it is waited for."""
ALONE_SECONDS = 10.0
"""A worker that waits for others so long, on a host that no coordinator can reach, is on the side that is cut off."""

logger = logging.getLogger(__name__)


class Agent:
    """Runs in one event loop; no method blocks for longer than a look at a file."""

    def __init__(self, options: AgentOptions) -> None:
        self._options = options
        self.folder = options.shared_memory / options.host
        self._keeper = ZygoteKeeper(self.folder, options.devices, self._say, self._preempted)
        self._persister = PersisterKeeper(self.folder, options.job, self._say)
        self._worker: Child | None = None
        self._service: Child | None = None
        self._children: set[Child] = set()
        self._copier: Copier | None = None
        self._fenced = 0
        """Nothing of this epoch or an older one may run here."""
        self._last_words: dict[int, dict[str, Any]] = {}
        self._order: Mapping[str, Any] | None = None
        """What the worker was started with, for a coordinator that was started again."""
        self._departure = Departure()
        self._over = asyncio.Event()
        self._exit_code, self._is_alone = 1, False
        self._run: Mapping[str, Any] = {}

    async def run(self) -> int:
        """Serves until the coordinator says that it is over; returns the exit code. Leaves no process and no file.

        Raises HostFolderError where the host's folder cannot be this agent's, and OSError for an address that cannot.
        """
        become_subreaper()
        self._loop = asyncio.get_running_loop()
        options = self._options
        self._place = HostFolder(options.shared_memory, options.host, options.job)
        try:
            self._prepare()
            self._inherit()
            link = LinkOptions(options.coordinator, options.listen, options.token, options.tls, options.takeover_after)
            self._link = Link(link, host_voter(self.folder, options.host), self._hello, self._obey, self._turned_away)
            await self._link.start()
        except BaseException:
            if self._place.is_new:
                self._place.remove()
            raise
        self._loop.add_signal_handler(signal.SIGTERM, self._terminated)
        works = (self._link.stay_connected, self._link.take_over, self._link.tell_silence, self._heartbeat, self._mail)
        tasks = [asyncio.create_task(work()) for work in works]
        tasks.append(asyncio.create_task(notice(options.maintenance, self._preempted)))
        try:
            over = asyncio.create_task(self._over.wait())
            done, _ = await asyncio.wait([*tasks, over], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {over}:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._end()
        return self._exit_code

    def _prepare(self) -> None:
        for name in (OWN, COPIES):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        self._view = WorkerView(self.folder)
        is_new = not (self.folder / VERDICTS).exists()
        self._verdicts = VerdictRecord(self.folder / VERDICTS, create=True)
        if is_new:
            self._verdicts.write(Verdicts(-1, -1))
        self._mailbox = Letters(self.folder)

    def _inherit(self) -> None:
        """Takes over what an earlier agent of this host left: its worker trains on as if nothing had happened."""
        options, estate = self._options, read_estate(self.folder)
        self._copies = CopyStore(self.folder, options.job, verify)
        for reason in self._copies.adopt():
            logger.warning("a copy that an earlier agent kept is not good: %s", reason)
        place = (options.listen, estate.port)
        self._server = PeerServer(
            self.folder, options.job, options.token, self._copies, *place, refused=self._turned_away
        )
        self._fenced = estate.fenced
        for name, heir in (("_worker", estate.worker), ("_service", estate.service)):
            if heir is not None and heir.is_alive():
                setattr(self, name, self._adopt(heir.pid, heir.epoch))
        if self._worker is not None and estate.order is not None:
            self._order = estate.order
            self._start_copier(estate.order)
        self._keep()

    def _keep(self) -> None:
        """Writes down what the next agent must know, should this one die."""

        def heir(child: Child | None) -> Heir | None:
            return heir_of(child.pid, child.epoch) if child is not None and child.exit is None else None

        port = int(self._server.address.rpartition(":")[2])
        Estate(self._fenced, port, heir(self._worker), heir(self._service), self._order).write(self.folder)

    def _start_copier(self, order: Mapping[str, Any]) -> None:
        options = self._options
        peers = {name: order["peers"][name] for name in order["copies_to"] if name in order["peers"]}
        whose = (options.host, options.job, options.token, peers, order["epoch"])
        self._copier = Copier(*whose, self._copied, self._breaker_changed)

    # Coordinator

    def _hello(self) -> dict[str, Any]:
        o = self._options
        return {
            "kind": "hello",
            "version": VERSION,
            "job": o.job,
            "host": o.host,
            "slice": o.slice,
            "devices": o.devices,
            "pid": os.getpid(),
            "peer": self._server.address,
            "control": self._link.control,
            "acceptor": self._link.acceptor.to_json(),
            "fenced": self._fenced,
            "committed": self._verdicts.read().committed,
            "copies": scan(self.folder, o.job),
            "work": self._order if self._has_worker() else None,
            "took": self._view.took(self._worker),
            "ready": self._keeper.ready,
            "leaving": self._departure.is_leaving,
        }

    def _say(self, kind: str, **fields: Any) -> None:
        """To the coordinator, if there is one; what it must know for sure is in the next hello."""
        self._link.say({"kind": kind, "host": self._options.host, **fields})

    def _preempted(self, why: str) -> None:
        """This host is to end. Where no coordinator hears of it now, the next hello says so."""
        self._departure.notice(time.monotonic())
        self._say("preempted", why=why)

    def _terminated(self) -> None:
        """SIGTERM to this very process: somebody may stand there and wait."""
        if notice := self._departure.signal(time.monotonic(), self._link.is_alone, self._has_worker()):
            logger.warning("%s: %s", self._options.host, notice)
        self._preempted("SIGTERM")
        self._leave_if_alone()

    def _has_worker(self) -> bool:
        return self._worker is not None and self._worker.exit is None

    def _leave_if_alone(self) -> None:
        why = self._departure.reason(time.monotonic(), self._link.silence, self._has_worker())
        if why and not self._over.is_set():
            logger.warning("%s leaves the run: %s", self._options.host, why)
            self._exit_code, self._is_alone = ExitReason.STOPPED.value, True
            self._over.set()

    async def _obey(self, message: dict[str, Any]) -> None:
        match message["do"]:
            case "welcome":
                self._run = message
                self._keeper.start(message)
            case "serve":
                await self._serve(message)
            case "work":
                await self._work(message)
            case "fence":
                await self._fence(message["epoch"], message.get("stacks", False))
            case "verdict":
                self._verdicts.write(Verdicts(*(message[field.name] for field in dataclasses.fields(Verdicts))))
            case "persist":
                if message["epoch"] > self._fenced:
                    self._persister.order(message["epoch"], message["step"], Path(message["target"]))
            case "drain" | "handover" as how:
                if self._worker is not None:
                    self._worker.send(STOP_SIGNALS[how])
            case "end":
                self._exit_code = message["code"]
                self._say(ENDED)  # else the coordinator would wait for this host, whose stream may only have broken
                self._loop.call_later(LAST_WORD_SECONDS, self._over.set)
            case "goodbye":
                self._over.set()
            case unknown:
                logger.warning("the coordinator says %r, which this version does not know", unknown)

    # Children

    async def _serve(self, message: Mapping[str, Any]) -> None:
        epoch = message["epoch"]
        try:
            request = {"do": "service", "processes": message["processes"], "host": self._options.listen}
            said = await self._keeper.request(request)
            self._service = self._adopt(said["pid"], epoch)
            self._keep()
        except (ForkError, ZygoteFailed, OSError) as error:
            self._say("service", epoch=epoch, error=str(error))
            return
        self._say("service", epoch=epoch, address=said["address"])

    async def _work(self, message: Mapping[str, Any]) -> None:
        epoch, options = message["epoch"], self._options
        if epoch <= self._fenced:
            self._say("started", epoch=epoch, error=f"epoch {epoch} was fenced here")
            return
        taken = ("epoch", "rank", "address", "mesh", "devices", "every", "generations", "choice", "smaller", "peers")
        job = WorkerJob(
            job=options.job,
            owner=f"{options.job} {options.token.digest}",
            host=options.host,
            listen=options.listen,
            folder=str(self.folder),
            run=self._run["run"],
            programs=str(cache_folder("programs")),
            processes=len(message["members"]),
            **{key: message[key] for key in taken},
        )
        self._copies.fence(epoch)
        self._start_copier(message)
        path = job.write(self.folder)
        self._view.begin()
        try:
            said = await self._keeper.request({"do": "worker", "job": str(path)})
            self._worker = self._adopt(said["pid"], epoch)
            self._order = {**message, "choice": None}
            self._keep()
        except (ForkError, ZygoteFailed, OSError) as error:
            self._say("started", epoch=epoch, error=str(error))
            return
        self._say("started", epoch=epoch, pid=said["pid"])

    def _adopt(self, pid: int, epoch: int) -> Child:
        child = Child(pid, epoch, self._child_ended)
        self._children.add(child)
        return child

    def _child_ended(self, child: Child, exit: Exit) -> None:
        self._children.discard(child)
        kind = "worker" if child is self._worker else "service" if child is self._service else ""
        if kind:
            self._tell_exit(kind, child, exit)

    def _tell_exit(self, kind: str, child: Child, exit: Exit) -> None:
        self._read_mail()  # its last words came before its end
        words = self._last_words.pop(child.pid, {})
        fields = {**child.how(), **self._view.place(child.pid)}
        if exit == Exit(None, None) and "reason" in words:  # inherited: its code went to nobody, its words came here
            fields["code"] = ExitReason[words["reason"]].value
        self._say(f"{kind}_exit", **{**words, **fields, "epoch": child.epoch})

    async def _fence(self, epoch: int, stacks: bool) -> None:
        """Ends everything of that epoch and of older ones, and says what memory is left here.

        `stacks`: the worker hangs; what Python says of where comes first.
        """
        if stacks and self._worker is not None and self._worker.epoch == epoch and self._worker.exit is None:
            self._say("stacks", epoch=epoch, text=await self._view.stacks(self._worker))
        self._fenced = max(self._fenced, epoch)
        self._keep()
        old = [child for child in self._children if child.epoch <= epoch]
        for child in old:
            child.kill()
        if self._copier is not None:
            self._copier.stop()
        self._persister.stop()
        await asyncio.gather(*(child.wait() for child in old))
        self._say("fenced", epoch=epoch, copies=scan(self.folder, self._options.job))

    # What the worker says and does

    async def _mail(self) -> None:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        loop.add_reader(self._mailbox, arrived.set)
        try:
            while True:
                await arrived.wait()
                arrived.clear()
                self._read_mail()
        finally:
            loop.remove_reader(self._mailbox)

    def _read_mail(self) -> None:
        for kind, message in self._mailbox.read():
            if kind == "slot_sealed" and self._copier is not None:
                path = self.folder / OWN / message["file"]
                generation = int(message["file"].removeprefix("gen-"))
                self._copier.sealed(Sealed(message["epoch"], message["step"], path, generation))
            elif kind == "preempted":
                self._preempted("SIGTERM")
                continue
            elif kind in ("error", "finished"):
                self._last_words[message["pid"]] = {"said": kind, **message}
            self._say(kind, **message)

    async def _heartbeat(self) -> None:
        while True:
            self._leave_if_alone()
            self._say("heartbeat", **self._view.heartbeat(self._worker))
            if min(self._link.unled, self._view.stuck_seconds(self._worker)) > ALONE_SECONDS:
                assert self._worker is not None
                logger.warning("cut off, and the worker waits for the others: it is ended")
                await self._fence(self._worker.epoch, stacks=False)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    # Memory

    def _copied(self, epoch: int, step: int, holder: str, reason: str) -> None:
        """Called in a thread of the copier."""
        fields = {"epoch": epoch, "step": step, "holder": holder, "reason": reason}
        self._loop.call_soon_threadsafe(lambda: self._say("slot_uncopied" if reason else "slot_copied", **fields))

    def _breaker_changed(self, change: Change) -> None:
        """Called in a thread of the copier."""
        detail = f"{self._options.host}: {change}"
        self._loop.call_soon_threadsafe(lambda: self._say("alarm", what="breaker", detail=detail))

    def _turned_away(self, address: str, reason: str) -> None:
        """Called in a thread of the slot server."""
        detail = f"{self._options.host}: {address}: {reason}"
        self._loop.call_soon_threadsafe(lambda: self._say("alarm", what="connection refused", detail=detail))

    # The end

    async def _end(self) -> None:
        for child in list(self._children):
            child.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(child.wait() for child in list(self._children))), 5)
        await self._keeper.close()
        await self._persister.close()
        if self._copier is not None:
            self._copier.stop()
        self._server.close()
        await self._link.close(waits=not self._is_alone)
        self._mailbox.close()
        self._view.close()
        self._verdicts.close()
        self._place.remove()
