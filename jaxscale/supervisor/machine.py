"""The coordinator's mind: what it knows of hosts and of the epoch, and what it does about each report. No I/O.

Every method takes the time and returns nothing; what is to be done is collected in `actions`: messages to agents, lines
of events.jsonl, the end. So a whole history of faults runs in a test without a process. Read next: `coordinator.py`,
which performs the actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxscale.checkpoint.interval import AUTO, allowed
from jaxscale.supervisor import evidence as ev
from jaxscale.supervisor.cadence import choose, notice_steps
from jaxscale.supervisor.facts import Epoch, Host, Note, Store
from jaxscale.supervisor.limits import Kind, suspects
from jaxscale.supervisor.records import SECTIONS
from jaxscale.supervisor.reports import evidence_of, rejection_of
from jaxscale.supervisor.states import DEADLINES, HANDOVER_SECONDS, State
from jaxscale.supervisor.transitions import Transitions
from jaxscale.supervisor.watch import learned, positions, progressed

PAUSE_SECONDS = 0.5
"""A longer time between two ticks is the coordinator's own: it slept, and the hosts' words wait in its sockets."""


SILENT_SECONDS = 0.6
"""Since an agent's last heartbeat (it sends five a second): its worker may have gone on meanwhile."""

NO_MEMORY = "memory checkpoint failed"
"""What an alarm of a worker says that has no memory tier any more (`supervised_run.py`)."""

SAID_ONCE = frozenset({"worker_exit", "service_exit", "error", "finished", "kept"})
"""Words that no agent repeats."""


class Machine(Transitions):
    """One supervised run: what it hears, and what time does to it."""

    # What agents say

    def hello(self, host: Host, now: float) -> None:
        """An agent has connected, for the first time or again."""
        known, leaves = self.hosts.get(host.name), host.is_leaving
        host.is_connected, host.heard, host.is_leaving = True, now, False
        if known is None or known.pid != host.pid:
            self._judge.came(host.name, self.reached)
        else:
            host.progress, host.is_leaving, host.is_deaf = known.progress, known.is_leaving, known.is_deaf
        self.hosts[host.name] = host
        self._agents[host.name] = host.control
        if self._is_final():
            self._tell(host.name, do="end", code=self._code)
            return
        epoch = self.epoch
        old = self.number if epoch is not None and self._is_over() else self.number - 1
        if epoch is not None and host.fenced < old:
            self._tell(host.name, do="fence", epoch=old)  # what it was told meanwhile did not reach it
        if epoch is not None:
            if known is not None and known.pid != host.pid and not host.copies and epoch.misses(host):
                self._started_anew(epoch, host, now - known.heard, now)
            else:
                self._check_worker(epoch, host, now)
        if leaves:
            self._preempted(host, now)
        self._proceed(now)

    def _started_anew(self, epoch: Epoch, host: Host, silent: float, now: float) -> None:
        """A member's host was gone for less than a lease. What the others saw of it, a collective that failed, is no
        more than that; who is lost is known only now.
        """
        if not self._is_over() or self.state in (State.SUSPECT, State.FENCING):
            self._suspect(ev.HostLost(host.name, epoch.number, silent, anew=True), now)

    def _check_worker(self, epoch: Epoch, host: Host, now: float) -> None:
        """An agent that knows of no worker is a new one, of a host that was restarted, or the worker died unseen."""
        if not self._is_over() and epoch.misses(host):
            rank = epoch.world.members.index(host.name)
            self._suspect(ev.WorkerExit(host.name, rank, epoch.number, signal=9, step=self.reached.step), now)

    def _catch_up(self, epoch: Epoch, now: float) -> None:
        early, self._early = self._early, []
        for name, message in early:
            if message.get("epoch") == epoch.number and name in epoch.world.members:
                self._of_this_epoch(epoch, self.hosts[name], message["kind"], message, now)
        for name in epoch.world.members:
            if self.hosts[name].is_connected:
                self._check_worker(epoch, self.hosts[name], now)

    def disconnected(self, name: str, now: float) -> None:
        """Its stream ended. The lease decides whether it is lost: agents connect again."""
        self.hosts[name].is_connected = False
        self._proceed(now)

    def message(self, name: str, message: Mapping[str, Any], now: float) -> None:
        """A message of a connected agent. What belongs to another epoch than this one changes nothing."""
        host = self.hosts[name]
        host.heard = now
        kind, epoch = message["kind"], self.epoch
        if kind in ("ready", "unready"):
            host.is_ready = kind == "ready"
        elif kind == "zygote_failed":
            raised = bool(message.get("raised", True))  # else it died without a word, again and again
            what = f"the recipe cannot be imported on {name}" if raised else f"no zygote can be started on {name}"
            if self.state is State.WAITING:  # no other attempt will be better
                self._finish(1, f"{what}:\n{message['text']}", now, State.ESCALATED)
            else:
                last = str(message["text"]).strip().rpartition("\n")[2]
                self.actions.append(Note("alarm", {"what": "zygote", "detail": f"{what}: {last}"}))
        elif kind == "preempted":
            self._preempted(host, now)
        elif kind == "alarm":
            self.actions.append(Note("alarm", {"what": message["what"], "detail": message["detail"]}))
            if message["what"] == NO_MEMORY and epoch is not None and name in epoch.world.members:
                self._without_memory(epoch)
        elif kind == "fenced":
            host.fenced = max(host.fenced, int(message["epoch"]))
            host.copies, host.is_deaf = list(message["copies"]), False
        elif epoch is not None and message.get("epoch") == epoch.number and name in epoch.world.members:
            self._of_this_epoch(epoch, host, kind, message, now)
        elif epoch is None and kind in SAID_ONCE:
            self._early.append((name, message))
        self._proceed(now)

    def _of_this_epoch(self, epoch: Epoch, host: Host, kind: str, message: Mapping[str, Any], now: float) -> None:
        name, commits = host.name, epoch.commits
        match kind:
            case "heartbeat":
                self._beat(epoch, host, message, now)
            case "service" if "address" in message:
                epoch.address = str(message["address"])
                self._start_workers(epoch)
            case "service" | "started" if "error" in message:
                self._suspect(ev.AgentRefused(name, epoch.number, str(message["error"])), now)
            case "started":
                epoch.started.add(name)
            case "begun":
                epoch.begun.add(name)
            case "restored" if name == epoch.world.members[0]:
                took = round(now - (self._fault_at or self.entered), 4)
                fields = {"step": message["step"], "sources": message["sources"], "seconds": took}
                self.actions.append(Note("restored", fields))
            case "finished":
                epoch.warmed.add(name)
                epoch.final_step = int(message["step"])
            case "kept":
                epoch.kept = str(message["tier"])
            case "slot_sealed":
                size, seconds, blocked = message["bytes"], message["seconds"], message["blocked_seconds"]
                self._announce(epoch, commits.sealed(name, message["step"], size, seconds, blocked))
            case "slot_skipped":
                self._announce(epoch, commits.skipped(name, message["step"]))
            case "slot_copied":
                self._announce(epoch, commits.copied(name, message["step"], message["holder"]))
            case "slot_uncopied":
                self._announce(epoch, commits.uncopied(name, message["step"]))
            case "persisted":
                if epoch.persisting.written(name, int(message["step"]), now):
                    ranks, mesh = len(epoch.world.members), dict(epoch.world.mesh)
                    self.actions.append(Store("finalise", message["step"], epoch.number, ranks, mesh))
            case "unpersisted":
                self._unpersisted(epoch, int(message["step"]), f"{name}: {message['reason']}", now)
            case "stacks":
                self.actions.append(Note("stacks", {"host": name, "text": message["text"]}))
            case "rejected":
                damaged, note = rejection_of(epoch, message)
                self.damaged.add(damaged)
                self.actions.append(note)
            case "worker_exit" | "service_exit" | "error":
                evidence = evidence_of(epoch, host, kind, message)
                if evidence is not None:
                    self._suspect(evidence, now)
                elif kind == "worker_exit":
                    epoch.ended[name], self._ended_at = message["code"], now

    def _beat(self, epoch: Epoch, host: Host, message: Mapping[str, Any], now: float) -> None:
        # All of it is taken, or nothing: a word that makes no sense ends its sender's stream, and no later tick.
        section = SECTIONS[SECTIONS.index(message["section"])]
        place: dict[str, Any] = {"epoch": epoch.number, "step": int(message["step"]), "section": section}
        place |= {"seconds": float(message["seconds"]), "finished": bool(message["finished"])}
        place["stopped"] = bool(message.get("stopped", False))
        pace = learned(self.pace, epoch, message["took"])
        host.progress = {**place, "told": now}
        if message["step"] > epoch.start_step or message["finished"]:
            epoch.warmed.add(host.name)
        self.reached = progressed(self.reached, epoch, message)
        if not self._is_over():  # what ends in a fault says nothing about how long things take
            self.pace = pace

    # The durable tier

    def lost(self, reason: str, now: float) -> None:
        """Another job owns the run: all of this one ends, and saves nothing."""
        if not self._is_final():
            self._finish(1, reason, now, State.ESCALATED)

    def _persist(self, epoch: Epoch, now: float) -> None:
        """Makes the newest committed step durable, where that is due."""
        persisting, pace = epoch.persisting, self.durable_pace
        pace.begins(now)
        if persisting.every == AUTO and epoch.plain < 0 and pace.becomes_late(now):
            detail = f"no durable step for {now - pace.newest:.0f} s; allowed are {allowed(pace.at_most):.0f}"
            self.actions.append(Note("alarm", {"what": "checkpoint too old", "detail": detail}))
        if persisting.is_stuck(now):
            self._unpersisted(epoch, persisting.step, f"{persisting.phase} takes too long", now)
        # The last state is saved by the workers themselves, in this very place.
        if epoch.commits.committed < self.settings.steps and persisting.begins(epoch.commits.committed, now):
            ranks, mesh = len(epoch.world.members), dict(epoch.world.mesh)
            self.actions.append(Store("room", persisting.step, epoch.number, ranks, mesh))
            self._announce(epoch, True)

    def stored(self, what: Store, reason: str, size: int, now: float) -> None:
        """How it went what a `Store` had asked for; the reason is empty where it went well."""
        epoch = self.epoch if self.epoch is not None and self.epoch.number == what.epoch else None
        if what.what == "finalise" and not reason:
            self.durable = max(self.durable, what.step)
            fields: dict[str, Any] = {"tier": "durable", "step": what.step, "bytes": size}
            if epoch is not None:
                fields["seconds"] = round(now - epoch.persisting.began, 4)
                epoch.persisting.sealed(what.step, now)
                self._announce(epoch, True)  # the slots are free again
            self.actions.append(Note("sealed", {**fields, "blocked_seconds": 0.0}))
            if self.settings.durable_every == AUTO and (seconds := self.durable_pace.news(now)) is not None:
                self.actions.append(Note("interval", {"tier": "durable", "seconds": round(seconds, 1)}))
        elif epoch is not None and reason:
            self._unpersisted(epoch, what.step, reason, now)
        elif epoch is not None and not self._is_over() and epoch.persisting.has_room(what.step, now):
            target = f"{self.settings.checkpoints}/{what.step}"
            for name in epoch.world.members:
                self._tell(name, do="persist", epoch=epoch.number, step=what.step, target=target)

    def _unpersisted(self, epoch: Epoch, step: int, reason: str, now: float) -> None:
        if epoch.persisting.failed(step, now):
            self.actions.append(Note("alarm", {"what": "save failed", "detail": f"step {step}: {reason}"}))
            self._announce(epoch, True)

    def _without_memory(self, epoch: Epoch) -> None:
        """No step is committed any more in this epoch: its workers save into the durable tier themselves."""
        if epoch.plain < 0 and self.settings.durable_every:
            steps = self.pace.durations.get(Kind("step", world=len(epoch.world.members)), ())
            epoch.plain = self.reached.step + notice_steps(steps)
            self._announce(epoch, True)

    # Time and people

    def tick(self, now: float) -> None:
        """Looks at leases and deadlines; call it some times a second."""
        epoch, slept = self.epoch, now - self._ticked
        self._ticked = now
        if slept > PAUSE_SECONDS:
            for host in self.hosts.values():
                host.heard += slept
        elif epoch is not None and not self._is_final() and self.state is not State.WAITING:
            self._check_leases(epoch, now)
            if not self._is_over():
                self._check_progress(epoch, now)
            self._check_deadline(epoch, now)
            if sealed := epoch.commits.news(now):
                self.actions.append(Note("sealed", {"tier": "memory", **sealed}))
            if self.state is State.RUNNING:
                self._persist(epoch, now)
            if self.settings.every == AUTO and self.state is State.RUNNING:
                self._set_cadence(epoch, now)
        self._proceed(now)

    def _set_cadence(self, epoch: Epoch, now: float) -> None:
        """Saves into memory as often as is worth what it was measured to cost."""
        self.costs = self.costs.sealed(epoch.commits.newest)
        steps = self.pace.durations.get(Kind("step", world=len(epoch.world.members)), ())
        choice = choose(self.costs, self.cadence, steps, now - self._began, self.reached.step)
        if choice is not None:
            self.cadence = choice.cadence
            self.actions.append(Note("cadence", choice.fields()))
            self._announce(epoch, True)

    def drain(self, reason: str, now: float) -> None:
        """Somebody asks the run to stop: the workers save and end. Asked again, it changes nothing."""
        if self.drain_reason or self._is_final():
            return
        self.drain_reason = reason
        if self.epoch is None and (self._awaits(now) or any(host.work is not None for host in self.hosts.values())):
            return  # an epoch is under way and will be taken over in a moment
        if self.epoch is None or self.state is State.WAITING:
            self._stop(reason, now)
        elif not self._is_over():
            self._end_epoch("drain", reason, now)

    def _preempted(self, host: Host, now: float) -> None:
        """A host is told to end. The others go on without it, from the step at which all save together."""
        if host.is_leaving:
            return
        host.is_leaving = True
        self.actions.append(Note("alarm", {"what": "preemption", "detail": f"{host.name} was told to end"}))
        if self.epoch is not None and host.name in self.epoch.world.members and not self._is_over():
            stays = any(not self.hosts[name].is_leaving for name in self.epoch.world.members)
            self._end_epoch("handover" if stays else "drain", f"{host.name} was told to end", now)

    def _check_leases(self, epoch: Epoch, now: float) -> None:
        lost = self._lost()
        for name in epoch.world.members:
            silent = now - self.hosts[name].heard
            is_through = name in epoch.ended and (not epoch.is_closing or self.hosts[name].fenced >= epoch.number)
            if silent > self.settings.lease_seconds and name not in lost and not is_through:
                self._suspect(ev.HostLost(name, epoch.number, silent), now)

    def _check_progress(self, epoch: Epoch, now: float) -> None:
        hung: list[ev.Evidence] = []
        suspected = suspects(positions(epoch, self.hosts), self.pace, now)
        if any(now - self.hosts[position.host].progress["told"] > SILENT_SECONDS for position in suspected):
            return  # of one whose agent says nothing nobody knows what it does: the lease decides, or its next word
        for position in suspected:
            place = (position.rank, epoch.number, position.kind.section, position.step)
            seconds, limit = now - position.entered, self.pace.limit(position.kind)
            hung.append(ev.WorkerHung(position.host, *place, seconds, limit, position.stopped))
        if hung:  # all of them are known before any is fenced: each is asked for its stacks then
            self.evidence += hung[:-1]
            self._suspect(hung[-1], now)

    def _some_leave(self, epoch: Epoch) -> bool:
        """And others go on."""
        return {self.hosts[name].is_leaving for name in epoch.world.members} == {True, False}

    def _check_deadline(self, epoch: Epoch, now: float) -> None:
        limit = DEADLINES.get(self.state)
        is_safe = epoch.commits.committed >= 0  # else this save is all there is, however long it takes
        if self.state is State.DRAINING and not self.drain_reason and is_safe and self._some_leave(epoch):
            limit = HANDOVER_SECONDS
        if limit is None or now - self.entered <= limit:
            return
        done = epoch.done_in(self.state) if self.state is not State.FENCING else self._fenced_or_gone(epoch)
        missing = tuple(name for name in epoch.world.members if name not in done)
        if self.state is State.FENCING:
            for name in missing:  # an agent that does not end its worker is as good as gone
                self.hosts[name].is_deaf = True
                self.evidence.append(ev.HostLost(name, epoch.number, now - self.hosts[name].heard))
        else:
            self._suspect(ev.PhaseExpired(epoch.number, self.state.value, now - self.entered, missing), now)
