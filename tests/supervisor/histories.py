"""A cluster without a process: agents and workers that do what the machine tells them, on a clock that the test moves.

Everything that is promised of any history is checked while it runs: states follow the diagram, epochs only grow, and
nothing of a new epoch starts while a worker of an older one may still run on a host that is there.
"""

import json
from dataclasses import dataclass, field

from jaxscale.axes import AXES
from jaxscale.supervisor.facts import Finish, Host, Note, Settings, Store, Tell, Verdict, World
from jaxscale.supervisor.judge import PATIENCE_SECONDS, TableJudge
from jaxscale.supervisor.machine import Machine
from jaxscale.supervisor.orders import check
from jaxscale.supervisor.states import NEXT, State
from jaxscale.supervisor.worlds import Request

TICK = 0.05
STEP_SECONDS = 0.1
NEVER = (10**9, 1)
"""No other cadence than the one that a worker was started with."""


def table_judge(slices=2, per_slice=2, on_loss="shrink", audit=None):
    sizes = {axis: {"data": slices, "fsdp": per_slice}.get(axis, 1) for axis in AXES}
    return TableJudge(Request(slices, per_slice, 1, sizes), on_loss, audit)


class ScriptedJudge:
    """Wants so many hosts, takes whoever is there, and finds each fault transient unless a verdict was put in."""

    def __init__(self, wanted):
        self.wanted, self.judged, self.verdicts, self.may_grow = wanted, [], [], False
        self.taken_over = None

    def judge(self, evidence, hosts, epoch, reached, now):
        del hosts, epoch, reached, now
        self.judged.append(list(evidence))
        return self.verdicts.pop(0) if self.verdicts else Verdict("transient", "scripted", "", ())

    def came(self, name, reached):
        pass

    def world(self, hosts, waited, now):
        del waited
        names = sorted(name for name, host in hosts.items() if host.is_usable(now))[: self.wanted]
        if len(names) < self.wanted:
            return None
        slices = {name: max(0, hosts[name].slice) for name in names}
        return World(tuple(names), slices, {"data": self.wanted}, self.wanted)

    def smaller(self):
        return None

    def could_grow(self, hosts, now):
        del hosts, now
        return self.may_grow

    def refusal(self):
        return ""

    def gives_up(self, there, waited):
        return there >= self.wanted or waited > PATIENCE_SECONDS

    def to_json(self):
        return {"scripted": True}

    def take_over(self, data):
        self.taken_over = data


@dataclass
class Worker:
    epoch: int
    step: int
    order: dict
    hangs: bool = False
    begun_at: float = 0.0
    asked: str = ""
    told: int = 0
    """The step that the heartbeat before told of."""
    cadence: tuple = NEVER

    def hang(self, now):
        if not self.hangs:
            self.hangs, self.begun_at = True, now


@dataclass
class FakeHost:
    name: str
    slice: int
    pid: int
    there: bool = True
    """Its agent runs and reaches the coordinator."""
    ready: bool = True
    fenced: int = 0
    committed: int = -1
    keep: int = -1
    plain: int = -1
    cadence: tuple = NEVER
    """From which step on its worker saves every how many steps."""
    deaf: set = field(default_factory=set)
    """Orders that it gets and does not obey; `begin`: its worker never has its state; `tell`: nor says where it is."""
    copies: list = field(default_factory=list)
    worker: Worker | None = None


@dataclass
class Storage:
    """What the storekeeper of the coordinator finds."""

    hangs: bool = False
    """Nothing is answered; what is asked meanwhile is kept in `asked`."""
    fails: str = ""
    """Why everything that is asked of it comes to nothing."""
    asked: list = field(default_factory=list)
    sealed: list = field(default_factory=list)


class History:
    """Drives one `Machine`. `run` lets time pass; the rest is what happens."""

    def __init__(
        self,
        slices=2,
        per_slice=2,
        spares=0,
        judge=None,
        steps=10_000,
        replicas=1,
        epoch=0,
        come=True,
        every=10,
        durable_every=0,
        **more,
    ):
        """`more`: other settings."""
        self.judge = judge or ScriptedJudge(slices * per_slice)
        self.now = 100.0
        self.settings = Settings(steps, every, 2, replicas, durable_every, checkpoints="durable", **more)
        self.storage = Storage()
        self.machine = Machine(self.settings, self.judge, self._source, epoch, self.now)
        names = [(f"host-{i}", i // per_slice) for i in range(slices * per_slice)]
        names += [(f"spare-{i}", -1) for i in range(spares)]
        self.hosts = {name: FakeHost(name, index, 1000 + i) for i, (name, index) in enumerate(names)}
        self.trained = 0
        """Where the state in memory is."""
        self.done, self.notes, self.told, self.finish = [], [], [], None
        self.epochs = []
        for fake in self.hosts.values():
            fake.there = come
        self._next_pid, self._next_step, self._performing = 5000, 0.0, False
        for name in names if come else ():
            self.connect(name[0])

    # What can be seen

    @property
    def state(self):
        return self.machine.state

    @property
    def members(self):
        return self.machine.epoch.world.members

    def states(self):
        return [note.fields["to"] for note in self.notes if note.kind == "state"]

    def orders(self, do, epoch=None):
        """(host, message) of every order of this kind."""
        return [(h, m) for h, m in self.told if m["do"] == do and (epoch is None or m.get("epoch") == epoch)]

    def faults(self):
        return [note.fields for note in self.notes if note.kind == "fault"]

    # What happens

    def connect(self, name, new_agent=False, **fields):
        """Its agent connects, the same as before or a new one. A new agent has no worker."""
        fake = self.hosts[name]
        if new_agent:
            self._next_pid += 1
            fake.pid, fake.fenced, fake.worker = self._next_pid, 0, None
        fake.there = True
        known = {
            "name": name,
            "slice": fake.slice,
            "devices": 1,
            "peer": f"{name}:1",
            "pid": fake.pid,
            "is_ready": fake.ready,
            "fenced": fake.fenced,
            "copies": list(fake.copies),
            "work": fake.worker.order if fake.worker is not None else None,
            "took": [("step", STEP_SECONDS, False)] * 20 if fake.worker is not None else [],
            "committed": fake.committed,
        }
        self.machine.hello(Host(**{**known, **fields}), self.now)
        self._perform()

    def say(self, name, kind, **fields):
        if not self.hosts[name].there:
            return
        self.machine.message(name, {"kind": kind, "host": name, **fields}, self.now)
        self._perform()

    def seal(self, name, epoch, step):
        fields = {"bytes": 100, "seconds": 0.1, "blocked_seconds": 0.01, "file": "gen-0"}
        self.say(name, "slot_sealed", epoch=epoch, step=step, **fields)

    def kill_worker(self, name, signal=9, **words):
        """Ends a worker; its agent tells at once."""
        worker, self.hosts[name].worker = self.hosts[name].worker, None
        place = {"section": "step", "step": worker.step}
        self.say(name, "worker_exit", epoch=worker.epoch, code=None, signal=signal, fenced=False, **place, **words)

    def raise_in_worker(self, name, error="ValueError", text="bad", code=1, **more):
        worker, self.hosts[name].worker = self.hosts[name].worker, None
        words = {"error_class": error, "text": text, "traceback": f"Traceback:\n{error}: {text}"}
        words |= {"is_collective": False, "section": "step", "step": worker.step, **more}
        self.say(name, "error", epoch=worker.epoch, pid=1, **words)
        last = {"said": "error", "code": code, "signal": None, "fenced": False}
        self.say(name, "worker_exit", epoch=worker.epoch, **words, **last)

    def lose(self, name, stream_ends=True):
        """The host is gone, or cut off. `stream_ends`: its connection breaks at once; else it is only silent."""
        self.hosts[name].there = False
        if stream_ends:
            self.machine.disconnected(name, self.now)
            self._perform()

    def answer(self, store):
        """The storekeeper has done what it was asked to, or could not."""
        if store.what == "finalise" and not self.storage.fails:
            self.storage.sealed.append(store.step)
        self.machine.stored(store, self.storage.fails, 100, self.now)
        self._perform()

    def preempt(self, name):
        self.say(name, "preempted", pid=1)

    def drain(self, reason="asked"):
        self.machine.drain(reason, self.now)
        self._perform()

    def run(self, seconds, until=None):
        """Lets time pass; stops early in a state. Fails where `until` does not come."""
        end = self.now + seconds
        beat = 0.0
        while self.now < end and self.finish is None:
            self.now += TICK
            self._train()
            if self.now >= beat:
                beat = self.now + 0.2
                for name in list(self.hosts):
                    self._beat(name)
            self.machine.tick(self.now)
            self._perform()
            if until is not None and self.state is until:
                return self
        assert until is None or self.state is until, f"{until} did not come; it is {self.state}: {self.states()[-6:]}"
        return self

    def until_running(self, epoch=None):
        """`epoch`: waits for this one; else for any that runs."""
        end = self.now + 30
        self.run(TICK)
        while self.now < end and (self.state is not State.RUNNING or (epoch or 0) > self.machine.number):
            self.run(TICK)
        assert self.state is State.RUNNING, f"RUNNING did not come; it is {self.state}: {self.states()[-6:]}"
        assert epoch is None or self.machine.number == epoch
        return self

    # Agents and workers

    def _beat(self, name):
        fake = self.hosts[name]
        if not fake.there:
            return
        worker = fake.worker
        if worker is None or "tell" in fake.deaf:
            self.say(name, "heartbeat", epoch=0)
            return
        seconds = 0.05 if not worker.hangs else self.now - worker.begun_at
        took = [["step", STEP_SECONDS, False]] * (worker.step - worker.told)
        worker.told = worker.step
        place = {"step": worker.step, "section": "step", "seconds": seconds, "finished": False, "took": took}
        self.say(name, "heartbeat", epoch=worker.epoch, **place)

    def _train(self):
        """One step, where a whole world is there and nobody hangs."""
        epoch = self.machine.epoch
        if epoch is None or self.now < self._next_step:
            return
        workers = [self.hosts[name].worker for name in epoch.world.members]
        living = [w for w in workers if w is not None and w.epoch == epoch.number]
        if len(living) < len(workers) or not all(self.hosts[name].there for name in epoch.world.members):
            for worker in living if epoch.warmed else ():  # they wait in a collective
                worker.hang(self.now)
        if len(living) < len(workers) or any(w.hangs for w in living):
            return
        self._next_step = self.now + STEP_SECONDS
        how = next((w.asked for w in workers if w.asked), "")
        if how or workers[0].step >= self.settings.steps:
            self._end_world(epoch, how)
            return
        for worker in workers:
            worker.step += 1
        if self._is_due(workers[0]):
            self._snapshot(epoch, workers[0].step)

    def _is_due(self, worker):
        since, every = worker.cadence
        return worker.step % worker.order["every"] == 0 if worker.step < since else (worker.step - since) % every == 0

    def _snapshot(self, epoch, step):
        for name in epoch.world.members:
            worker = self.hosts[name].worker
            if worker is None:
                return
            self.seal(name, epoch.number, step)
            for holder in worker.order["copies_to"]:
                self.say(name, "slot_copied", epoch=epoch.number, step=step, holder=holder, reason="")
        self.trained = step

    def _end_world(self, epoch, how):
        step, code = self.hosts[epoch.world.members[0]].worker.step, 75 if how else 0
        if how == "handover":
            self._snapshot(epoch, step)
        self.trained = step
        for name in epoch.world.members:
            self.hosts[name].worker = None
            self.say(name, "kept", epoch=epoch.number, tier="memory" if how == "handover" else "durable")
            self.say(name, "finished", epoch=epoch.number, pid=1, reason="", step=step)
            words = {"said": "finished", "code": code, "signal": None, "fenced": False}
            self.say(name, "worker_exit", epoch=epoch.number, **words)

    def _source(self, hosts, lineage, damaged):
        del hosts, lineage, damaged
        choice = {"step": self.trained, "epoch": self.machine.number} if self.trained else None
        return self.trained, choice

    def _perform(self):
        """Does what the machine wants, and checks what holds for any history."""
        if self._performing:  # an agent answers at once: what follows from it comes after what is under way
            return
        self._performing = True
        try:
            self._perform_all()
        finally:
            self._performing = False

    def _perform_all(self):
        assert self.state is not State.DECIDING, "what is decided is decided at once, and needs no deadline"
        while self.machine.actions:
            actions, self.machine.actions = self.machine.actions, []
            for action in actions:
                match action:
                    case Note():
                        self.notes.append(action)
                        if action.kind == "state":
                            before, after = State(action.fields["from"]), State(action.fields["to"])
                            assert after in NEXT[before]
                    case Finish():
                        assert self.finish is None, "the run ended twice"
                        self.finish = action
                    case Store():
                        self.storage.asked.append(action)
                        if not self.storage.hangs:
                            self.answer(action)
                    case Tell():
                        check(json.loads(json.dumps(dict(action.message))))  # an agent would refuse it
                        self.told.append((action.host, dict(action.message)))
                        self._obey(self.hosts[action.host], dict(action.message))

    def _obey(self, fake, message):
        do = message["do"]
        if do in ("serve", "work"):
            self._check_start(message["epoch"])
        if not fake.there or do in fake.deaf:
            return
        match do:
            case "serve":
                self.say(fake.name, "service", epoch=message["epoch"], address="127.0.0.1:1")
            case "work":
                step = self.machine.epoch.start_step
                fake.worker = Worker(message["epoch"], step, message, begun_at=self.now, told=step)
                fake.worker.cadence = fake.cadence
                self.say(fake.name, "started", epoch=message["epoch"], pid=1)
                if "begin" in fake.deaf:  # it joins, and that is all that is ever heard of it
                    return
                self.say(fake.name, "restored", epoch=message["epoch"], step=step, sources={})
                self.say(fake.name, "begun", epoch=message["epoch"])
            case "verdict":
                fake.committed, fake.keep, fake.plain = message["committed"], message["keep"], message["plain"]
                if message["every"]:
                    fake.cadence = (message["since"], message["every"])
                if fake.worker is not None:
                    fake.worker.cadence = fake.cadence
            case "persist":
                assert message["target"] == f"durable/{message['step']}"
                assert fake.keep == message["step"], "a slot that may be written over is read"
                self.say(fake.name, "persisted", epoch=message["epoch"], step=message["step"], bytes=9, seconds=0.1)
            case "drain" | "handover" if fake.worker is not None:
                fake.worker.asked = do
            case "fence":
                fake.fenced = max(fake.fenced, message["epoch"])
                if message.get("stacks"):
                    self.say(fake.name, "stacks", epoch=message["epoch"], text="File loop.py, line 1")
                worker = fake.worker
                if worker is not None and worker.epoch <= message["epoch"]:
                    fake.worker = None
                    words = {"code": None, "signal": 9, "fenced": True}
                    self.say(fake.name, "worker_exit", epoch=worker.epoch, **words)
                self.say(fake.name, "fenced", epoch=message["epoch"], copies=list(fake.copies))

    def _check_start(self, epoch):
        assert not self.epochs or epoch >= self.epochs[-1], "an old epoch was started"
        if not self.epochs or epoch > self.epochs[-1]:
            self.epochs.append(epoch)
        running = {
            name: fake.worker.epoch
            for name, fake in self.hosts.items()
            if fake.there and not fake.deaf and fake.worker is not None and fake.worker.epoch < epoch
        }
        assert not running, f"epoch {epoch} starts while workers of older ones run: {running}"
