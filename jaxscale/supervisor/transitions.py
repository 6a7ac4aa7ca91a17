"""How a supervised run goes on: from state to state, from epoch to epoch. The half of the machine that decides.

What makes it move, the reports of agents and the clock, is in `machine.py`; read that next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxscale.checkpoint.cover import Damaged
from jaxscale.supervisor import evidence as ev
from jaxscale.supervisor.budget import Mark
from jaxscale.supervisor.cadence import UNDECIDED, Costs
from jaxscale.supervisor.commits import MemoryCommits
from jaxscale.supervisor.durable_pace import DurablePace
from jaxscale.supervisor.facts import Action, Epoch, Finish, Host, Judge, Note, Settings, Source, Tell, World
from jaxscale.supervisor.limits import Pace
from jaxscale.supervisor.orders import work_orders
from jaxscale.supervisor.persisting import Persisting
from jaxscale.supervisor.states import State, check
from jaxscale.supervisor.takeover import decided, find_epoch, memo_of, past
from jaxscale.supervisor.watch import learned

WINDOW_SECONDS = 0.2
"""How long further evidence of a fault is waited for, while not every member has been fenced."""

COPIES_SECONDS = 5.0
"""How long the last memory checkpoint of an epoch may take to be copied before the next one is formed."""

GROW_SECONDS = 2.0
"""How long a host must be there again before the world grows for it."""

STOPPED = 75
REFUSED = 2


class Transitions:
    """State and moves of one supervised run. Every method takes the time; nothing here does I/O."""

    def __init__(self, settings: Settings, judge: Judge, source: Source, epoch: int, now: float) -> None:
        """`source` says where the next epoch starts; `epoch`: the highest one that the run directory knows."""
        self.settings, self._judge, self._source = settings, judge, source
        self.state = State.WAITING
        self.entered = self._began = self._idle_since = now
        self.number = epoch
        self.epoch: Epoch | None = None
        self.hosts: dict[str, Host] = {}
        self.evidence: list[ev.Evidence] = []
        self.lineage: list[tuple[int, int]] = []
        self.damaged: set[Damaged] = set()
        self.pace = Pace()
        self.reached = Mark()
        self.costs, self.cadence = Costs(), UNDECIDED
        self.durable = settings.durable
        """The newest durable step."""
        self.durable_pace = DurablePace(settings.durable_apart, settings.durable_age)
        self.actions: list[Action] = []
        self.drain_reason = ""
        self._fault_at = 0.0
        self._resume_at = 0.0
        self._ended_at = 0.0
        self._grow_since = 0.0
        self._ticked = now
        self._end_when_formed: tuple[str, str] | None = None
        self._decided_epoch = self._ended_epoch = 0
        """Of an earlier coordinator, which had decided that it is over."""
        self._agents: dict[str, str] = {}
        self._expected: tuple[str, ...] = ()
        """Members of the world of an earlier coordinator: some of them may be about to connect to this one."""
        self._code: int | None = None
        self._early: list[tuple[str, Mapping[str, Any]]] = []
        """Host and message, of an epoch that this coordinator has not found yet."""

    # What is decided

    def to_json(self) -> dict[str, Any]:
        """What has to be decided by a majority before anything that follows from it is done."""
        is_over = self.epoch is None or self._is_over()
        ends = self.drain_reason, self._code
        return decided(self.number, self.epoch, is_over, self._judge, self.lineage, *ends, self._agents)

    def take_over(self, value: Mapping[str, Any], now: float) -> None:
        """Begins with what the coordinator before had decided (`to_json`); call it before any agent is heard."""
        before = past(value)
        # The run directory may say more: each start of a coordinator counts there.
        self.number = self._decided_epoch = before.number
        self.lineage, self.drain_reason = list(before.lineage), before.drain
        self._judge.take_over(before.judge)
        self._ended_epoch = before.number if before.is_over else 0
        self._expected, self._began = before.members, now
        self._agents = dict(before.agents)
        if before.finish is not None:
            text = "" if before.finish == 0 else "the run was over when its coordinator died; see events.jsonl"
            self._finish(before.finish, text, now, State.DONE if before.finish in (0, STOPPED) else State.ESCALATED)

    # How it goes on

    def _proceed(self, now: float) -> None:
        """Leaves a state as soon as what it waits for is there."""
        before = None
        while before is not self.state and not self._is_final():
            before = self.state
            self._step(now)

    def _step(self, now: float) -> None:
        epoch = self.epoch
        if self.state is State.WAITING:
            self._wait(now)
        elif self.state is State.DECIDING:
            self._decide(now)
        elif epoch is not None:
            self._step_epoch(epoch, set(epoch.world.members), now)

    def _step_epoch(self, epoch: Epoch, members: set[str], now: float) -> None:
        if epoch.ended.keys() >= members and not self._is_over():
            self._ended(epoch, now)
        elif self.state is State.FORMING and epoch.started >= members:
            self._enter(State.RESTORING, "all workers are forked", now)
            if self._end_when_formed is not None:
                self._end_epoch(*self._end_when_formed, now)
        elif self.state is State.RESTORING and epoch.begun >= members:
            self._enter(State.WARMING, "all workers have their state", now)
        elif self.state is State.WARMING and epoch.warmed >= members:
            self._enter(State.RUNNING, "all workers have done a step", now)
            self._fault_at = 0.0
        elif self.state is State.RUNNING:
            self._grow(now)
        elif self.state is State.SUSPECT and (now - self.entered >= WINDOW_SECONDS or self._is_fenced(epoch)):
            self._enter(State.FENCING, "the evidence is in", now)
        elif self.state is State.FENCING and self._is_fenced(epoch):
            self._enter(State.DECIDING, "the epoch's workers are gone", now)

    def _wait(self, now: float) -> None:
        for host in self.hosts.values():
            if host.work is not None and host.work["epoch"] < self._decided_epoch:
                host.work = None  # over, as a coordinator before decided
                self._tell(host.name, do="fence", epoch=self.number - 1)
        for host in self.hosts.values():
            if host.is_usable(now):
                self._judge.came(host.name, self.reached)  # given up, but there: while no world is, nobody else asks
        running = {name: host for name, host in self.hosts.items() if host.work is not None}
        if self.epoch is None and running:
            self._adopt(running, now)
        elif self.epoch is None and self._awaits(now):
            return
        elif self.epoch is None and self.drain_reason:
            self._stop(self.drain_reason, now)
        elif self.epoch is None and not self.lineage and (why := self._judge.refusal()):
            self._finish(REFUSED, why, now, State.ESCALATED)
        elif self._all_leave(now):
            self._stop("all hosts were told to end", now)
        elif now >= self._resume_at and self._judge.world(self.hosts, now - self._idle_since, now) is not None:
            self._enter(State.DECIDING, "enough hosts are there", now)

    def _awaits(self, now: float) -> bool:
        """Whether members of the world of an earlier coordinator may be about to come to this one."""
        is_early = now - self._began < self.settings.adopt_seconds
        return is_early and any(not self._is_back(name, now) for name in self._expected)

    def _is_back(self, name: str, now: float) -> bool:
        return name in self.hosts and self.hosts[name].is_usable(now)

    def _adopt(self, running: Mapping[str, Host], now: float) -> None:
        """This coordinator was started again: the epoch under way is found with the agents, and nobody is disturbed."""
        found = find_epoch(running.values())
        if not found.there.issuperset(found.epoch.world.members) and now - self._began < self.settings.adopt_seconds:
            return
        if self.number <= found.epoch.number and not self.lineage:
            self._judge.take_over(found.judge)  # nothing newer is known to be decided
            self.lineage = list(found.lineage)
        self.epoch, self.number = found.epoch, found.epoch.number
        self.reached = found.reached
        # Without what was learned a hang would be one after minutes only, the generous limits of a start.
        self.pace = found.pace
        for host in running.values():
            if host.work is not None and host.work["epoch"] == self.number:
                self.pace = learned(self.pace, found.epoch, host.took)
        for name in found.epoch.world.members:
            self.hosts.setdefault(name, Host(name, found.epoch.world.slices[name], 0, heard=self._began))
        found.epoch.persisting = self._persisting(found.epoch.world.members, self.durable)
        self._enter(State.RUNNING, f"epoch {self.number} was found running", now)
        self._catch_up(found.epoch, now)
        if self._is_over():
            return
        if self.number == self._ended_epoch:  # why, the coordinator before took with it
            self._suspect(ev.PhaseExpired(self.number, State.FENCING.value, 0.0, ()), now)
        elif self.drain_reason:
            self._end_epoch("drain", self.drain_reason, now)
        elif leaving := [name for name in found.epoch.world.members if self.hosts[name].is_leaving]:
            how = "handover" if len(leaving) < len(found.epoch.world.members) else "drain"
            self._end_epoch(how, f"{', '.join(leaving)} was told to end", now)

    def _catch_up(self, epoch: Epoch, now: float) -> None:
        """What was said while the epoch was not found yet counts now."""
        raise NotImplementedError

    def _end_epoch(self, how: str, reason: str, now: float) -> None:
        """Workers save at one step and end: `drain` into the durable tier, `handover` into memory."""
        assert self.epoch is not None
        if self.state is State.FORMING:  # there may be no worker yet that could hear of it
            self._end_when_formed = (how, reason)
            return
        for name in self.epoch.world.members:
            self._tell(name, do=how)
        if self.state is not State.DRAINING:
            self._enter(State.DRAINING, reason, now)

    def _suspect(self, evidence: ev.Evidence, now: float) -> None:
        """Takes evidence of a fault. A world that lost a worker cannot go on: its workers are ended at once."""
        self.evidence.append(evidence)
        if isinstance(evidence, ev.WorkerExit | ev.WorkerError):
            self.reached = Mark(max(self.reached.step, evidence.step), self.reached.seconds)
        if self._is_over() or self.epoch is None:
            return
        self._fault_at = self._idle_since = now
        self._enter(State.SUSPECT, ev.sentence(evidence), now)
        hung = {e.host for e in self.evidence if isinstance(e, ev.WorkerHung)}
        for name in self.epoch.world.members:
            self._tell(name, do="fence", epoch=self.epoch.number, stacks=name in hung)

    def _decide(self, now: float) -> None:
        if self.evidence:
            evidence, self.evidence = self.evidence, []
            verdict = self._judge.judge(evidence, self.hosts, self.number, self.reached, now)
            self.actions.append(verdict.note())
            self.costs = self.costs.failed()
            if verdict.stop:
                self._finish(1, verdict.text, now, State.ESCALATED)
                return
            self._resume_at = now + verdict.delay
        if self.drain_reason:
            self._stop(self.drain_reason, now)
            return
        world = self._judge.world(self.hosts, now - self._idle_since, now) if now >= self._resume_at else None
        if world is None:
            self._enter(State.WAITING, "not enough hosts" if now >= self._resume_at else "a pause after a failure", now)
        else:
            self._form(world, now)

    def _form(self, world: World, now: float) -> None:
        if self.epoch is not None and len(world.members) != len(self.epoch.world.members):
            before, after = (len(set(w.slices.values())) for w in (self.epoch.world, world))
            sizes = f"{len(self.epoch.world.members)} hosts before, {len(world.members)} now"
            self.actions.append(Note("resized", {"slices_before": before, "slices_after": after, "reason": sizes}))
        step, choice = self._source(self.hosts, self.lineage, self.damaged)
        self._end_when_formed = None
        self.number += 1
        self.lineage.append((self.number, step))
        replicas = min(self.settings.replicas, len(world.members) - 1)
        if choice is None and self.lineage[:-1]:
            self.durable_pace.failures += 1
        commits = MemoryCommits(world.members, replicas, step if choice else -1)
        persisting = self._persisting(world.members, step if choice is None else min(step, self.durable))
        self.epoch = Epoch(self.number, world, step, choice, world.members[0], commits, persisting)
        reason = f"epoch {self.number} of {len(world.members)} hosts from step {step}"
        self._enter(State.FORMING, reason, now)
        self._tell(self.epoch.service, do="serve", epoch=self.number, processes=len(world.members))

    def _persisting(self, members: Sequence[str], done: int) -> Persisting:
        every = self.settings.durable_every if self.settings.every != 0 else 0
        return Persisting(tuple(members), every, done, self.durable_pace)

    def _start_workers(self, epoch: Epoch) -> None:
        self._announce(epoch, True)
        memo = memo_of(epoch, self._judge, self.lineage, self.reached, self.pace)
        self.actions += work_orders(epoch, self.hosts, self.settings, self._judge.smaller(), memo, self.cadence)

    def _announce(self, epoch: Epoch, is_news: bool) -> None:
        """Tells what is committed: workers may write decided steps' slots again. And how often they are to save."""
        verdict = {
            "committed": epoch.commits.committed,
            "decided": epoch.commits.decided,
            "since": self.cadence.since,
            "every": self.cadence.every,
            "keep": epoch.persisting.keep,
            "plain": epoch.plain,
        }
        for name in epoch.world.members if is_news else ():
            self._tell(name, do="verdict", **verdict)

    def _grow(self, now: float) -> None:
        """Takes hosts in that are there (again), once they have been for a while: each resize costs seconds."""
        for host in self.hosts.values():
            if host.is_usable(now):
                self._judge.came(host.name, self.reached)  # perhaps progress has paid for what it did
        if not self._judge.could_grow(self.hosts, now):
            self._grow_since = 0.0
        elif not self._grow_since:
            self._grow_since = now
        elif now - self._grow_since >= GROW_SECONDS:
            self._grow_since = 0.0
            self._end_epoch("handover", "a larger world can be formed", now)

    def _ended(self, epoch: Epoch, now: float) -> None:
        """All workers of the epoch ended well."""
        if all(code == 0 for code in epoch.ended.values()):
            self._finish(0, "", now)
        elif self.drain_reason or not any(host.is_usable(now) for host in self.hosts.values()):
            self._stop(self.drain_reason or "all hosts were told to end", now)
        elif self._is_fenced(epoch):
            self._idle_since = now
            self._enter(State.DECIDING, f"everything up to step {epoch.final_step} is kept", now)
        elif not epoch.is_closing and (
            epoch.commits.committed >= epoch.final_step
            or epoch.kept == "durable"  # a host had lost its memory tier
            or now - self._ended_at > COPIES_SECONDS
        ):
            epoch.is_closing = True
            for name in epoch.world.members:
                self._tell(name, do="fence", epoch=epoch.number)

    def _stop(self, why: str, now: float) -> None:
        """The run ends before its last step. Says what is left of it: the memory of the hosts ends with them."""
        epoch = self.epoch
        if epoch is None:
            kept = " while no worker was running"
        elif epoch.kept == "durable" and epoch.final_step >= 0:
            kept = f" and saved at step {epoch.final_step}"
        else:
            kept = "; what was trained since the newest durable checkpoint, or else since step 0, is lost"
        self._finish(STOPPED, f"stopped ({why}){kept}", now)

    def to_be_told(self, now: float) -> set[str]:
        """Hosts that must hear of the end: who is there, may come again, or knew only an earlier coordinator."""
        lease, is_early = self.settings.lease_seconds, now - self._began < 2 * self.settings.adopt_seconds
        there = {name for name, host in self.hosts.items() if host.is_connected or now - host.heard < lease}
        return there | ({name for name in self._agents if name not in self.hosts} if is_early else set())

    # Small things

    def _finish(self, code: int, text: str, now: float, state: State = State.DONE) -> None:
        self._code = code
        self._enter(state, text.partition("\n")[0] or "every step is trained and saved", now)
        if code == 0:
            self.actions.append(Note("done", {"step": self.settings.steps}))
        for name in self.hosts:
            self._tell(name, do="end", code=code)
        self.actions.append(Finish(code, text))

    def _enter(self, state: State, reason: str, now: float) -> None:
        check(self.state, state)
        self.actions.append(Note("state", {"from": self.state.value, "to": state.value, "reason": reason}))
        self.state, self.entered = state, now

    def _tell(self, host: str, **message: Any) -> None:
        self.actions.append(Tell(host, message))

    def _is_final(self) -> bool:
        return self.state in (State.DONE, State.ESCALATED)

    def _is_over(self) -> bool:
        """Whether the epoch is over in this state: nobody of it may train any more."""
        over = (State.WAITING, State.SUSPECT, State.FENCING, State.DECIDING, State.DONE, State.ESCALATED)
        return self.state in over

    def _all_leave(self, now: float) -> bool:
        """Whether every host that is there was told to end, and no other is to come: no world will be formed of these.

        Before the first world others may be on their way still; after it, who is not there any more was lost.
        """
        lease = self.settings.lease_seconds  # until it is over, one whose stream broke may connect again
        there = [host for host in self.hosts.values() if host.is_connected or now - host.heard < lease]
        if not there or not all(host.is_leaving for host in there):
            return False
        return bool(self.lineage) or self._judge.gives_up(len(there), now - self._idle_since)

    def _is_fenced(self, epoch: Epoch) -> bool:
        return self._fenced_or_gone(epoch) >= set(epoch.world.members)

    def _fenced_or_gone(self, epoch: Epoch) -> set[str]:
        lost = self._lost()
        return {name for name in epoch.world.members if self.hosts[name].fenced >= epoch.number or name in lost}

    def _lost(self) -> set[str]:
        return {e.host for e in self.evidence if isinstance(e, ev.HostLost)}
