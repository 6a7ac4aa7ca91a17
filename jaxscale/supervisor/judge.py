"""What a fault means and which world comes next: policy and plans, with the memory that they need, for the machine.

The decisions are pure functions of `domains.py`, `policy.py` and `worlds.py`; here lies what they have to remember
between two faults. Read next: `policy.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxscale.supervisor import evidence as ev
from jaxscale.supervisor import worlds
from jaxscale.supervisor.budget import History, Mark
from jaxscale.supervisor.domains import group
from jaxscale.supervisor.facts import Host, Verdict, World
from jaxscale.supervisor.legal import LegalMeshes
from jaxscale.supervisor.policy import PolicyConfig, Replace, Retry, Shrink, Situation, Stop, Wait, decide, welcome
from jaxscale.supervisor.worlds import PlannedWorld, Request

PATIENCE_SECONDS = 60.0
"""How long a run waits for all its hosts before it begins with fewer, or with spares."""

WAKING_SECONDS = 6.0
"""How long it waits after a fault for a host whose agent was started again and is not ready yet."""


AUDIT_SECONDS = 60.0
"""How long the first world waits for the audit to say whether the model fits on its mesh."""


class TableJudge:
    """The `Judge` of a run: judges by the policy's table, plans worlds of what the recipe asks for."""

    def __init__(
        self, request: Request, on_loss: Literal["shrink", "wait"], audit: LegalMeshes | None = None, job: str = ""
    ) -> None:
        """`audit`: what the request asks whether a mesh is legal, where that has to be waited for."""
        self._request, self._audit = request, audit
        self._policy = PolicyConfig(on_loss=on_loss, job=job)
        self._current: PlannedWorld | None = None
        self._history = History()
        self._left: set[str] = set()
        """Hosts that had to leave; they are asked back when they are there anew, or were forgiven."""

    def judge(
        self, evidence: Sequence[ev.Evidence], hosts: Mapping[str, Host], epoch: int, reached: Mark, now: float
    ) -> Verdict:
        """Decides on one failure and remembers it."""
        told = tuple(ev.to_json(e) for e in evidence)
        members = self._current.members if self._current is not None else ()
        slices = {member.name: member.slice or 0 for member in members}
        found = group(evidence, slices, epoch)
        if self._current is None or not found.causes:
            return self._without_world(evidence, told)
        usable = [self._plain(host) for host in hosts.values() if host.is_usable(now)]
        names = set(self._current.names) | self._left
        spares = tuple(host for host in usable if host.name not in names)
        situation = Situation(self._current, spares, self._request, reached)
        decision = decide(found, self._history, situation, self._policy)
        self._history = decision.history
        action = decision.action
        match action:
            case Replace():
                self._left |= {old for old, _ in action.pairs}
            case Shrink() | Wait():
                self._left |= set(action.hosts)
        return Verdict(
            fault_class=decision.fault_class,
            # A worker that raises says so, and then ends by it: the same twice.
            cause="; ".join(list(dict.fromkeys(ev.sentence(e) for e in found.causes))[:3]),
            host=", ".join(decision.hosts),
            evidence=told,
            stop=isinstance(action, Stop),
            text=action.text if isinstance(action, Stop) else "",
            delay=action.wait_seconds if isinstance(action, Retry) else 0.0,
        )

    def came(self, name: str, reached: Mark) -> None:
        """A host is there anew. One that was lost is welcome; one with too many strikes only once they are paid."""
        if welcome(name, self._history, reached, self._policy):
            self._left.discard(name)

    def world(self, hosts: Mapping[str, Host], waited: float, now: float) -> World | None:
        """The best world of the hosts that are usable now; None while it is better to wait.

        waited: seconds that nothing has been trained for, since the start of the run or since the last fault.
        """
        if self._current is None and self._audit is not None and not self._audit.is_answered and waited < AUDIT_SECONDS:
            return None  # until then each mesh is thought to be legal, and a smaller one could be chosen that is not
        usable = self._usable(hosts, now)
        if self._current is None and waited <= PATIENCE_SECONDS:
            usable = [host for host in usable if host.slice is not None]  # spares stay spares while others may come
        planned = worlds.plan(self._request, usable, self._current)
        if planned is None:
            return None
        if len(planned.members) < self._request.hosts:
            patience = (
                PATIENCE_SECONDS if self._current is None else WAKING_SECONDS if self._waking(hosts, now) else 0.0
            )
            if self._policy.on_loss == "wait" or waited <= patience:
                return None
        self._current = planned
        return self._as_world(planned)

    def smaller(self) -> World | None:
        """The world after the next loss; None where there is none, or the recipe waits instead."""
        if self._current is None or self._policy.on_loss == "wait":
            return None
        planned = worlds.next_smaller(self._request, self._current)
        return self._as_world(planned) if planned is not None else None

    def could_grow(self, hosts: Mapping[str, Host], now: float) -> bool:
        """Whether a larger world than the current one can be formed."""
        if self._current is None:
            return False
        return worlds.grown(self._request, self._usable(hosts, now), self._current) is not None

    def refusal(self) -> str:
        """Why the requested world cannot be, as the audit says; nothing where it can, or while nobody knows."""
        return self._audit.why(self._request.sizes) if self._audit is not None else ""

    def gives_up(self, there: int, waited: float) -> bool:
        """Whether to wait for no more hosts than the `there` of the first world's that have come after so long."""
        return there >= self._request.hosts or waited > PATIENCE_SECONDS

    def to_json(self) -> dict[str, Any]:
        """For a coordinator that takes over."""
        members = (
            []
            if self._current is None
            else [[m.name, m.slice, m.devices, m.is_emulated] for m in self._current.members]
        )
        axes = [] if self._current is None else [list(axis) for axis in self._current.axes]
        return {"history": self._history.to_json(), "left": sorted(self._left), "members": members, "axes": axes}

    def take_over(self, data: Mapping[str, Any]) -> None:
        """What `to_json` of the coordinator before gave."""
        self._history = History.from_json(data["history"])
        self._left = set(data["left"])
        if data["members"]:
            members = tuple(worlds.Host(*member) for member in data["members"])
            self._current = PlannedWorld(members, tuple((axis, size) for axis, size in data["axes"]))

    def _usable(self, hosts: Mapping[str, Host], now: float) -> list[worlds.Host]:
        return [self._plain(h) for h in hosts.values() if h.is_usable(now) and h.name not in self._left]

    def _waking(self, hosts: Mapping[str, Host], now: float) -> bool:
        """Whether a host is about to be usable: its agent is there, its zygote is importing. Two resizes cost more."""
        return any(h.is_connected and not h.is_ready and not h.is_leaving and now - h.heard < 2 for h in hosts.values())

    def _as_world(self, planned: PlannedWorld) -> World:
        is_emulated = all(member.is_emulated for member in planned.members)
        devices = len(planned.members) * self._request.devices_per_host if is_emulated else 0
        slices = {member.name: member.slice or 0 for member in planned.members}
        return World(planned.names, slices, planned.sizes, devices)

    def _plain(self, host: Host) -> worlds.Host:
        """A host as the plans see it; slice -1 is a spare for any."""
        devices = host.devices or self._request.devices_per_host
        return worlds.Host(host.name, host.slice if host.slice >= 0 else None, devices, host.devices > 0)

    @staticmethod
    def _without_world(evidence: Sequence[ev.Evidence], told: tuple[dict[str, Any], ...]) -> Verdict:
        """Before any world, or when nothing but our own killing was seen."""
        worst = next((e for e in evidence if isinstance(e, ev.WorkerExit) and not e.fenced), None)
        if worst is not None:
            return Verdict(
                "fatal", ev.sentence(worst), worst.host, told, stop=True, text=Stop("", (worst,)).text.strip()
            )
        return Verdict("transient", "the epoch was ended before it began", "", told)
