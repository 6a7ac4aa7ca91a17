"""What agents say, as evidence: an agent's words about an exit, an error or a service become what policy judges. Pure.

Read next: `evidence.py`, `machine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxscale.checkpoint.cover import Damaged
from jaxscale.supervisor import evidence as ev
from jaxscale.supervisor.facts import Epoch, Host, Note

FINISHED = (0, 75)
"""Exit codes of a worker that did what it was to do: trained to the end, or stopped because it was asked."""

DAMAGED = "NoGoodCopy"
"""Name of the error of a worker that could not restore (`checkpoint/assemble.py`)."""


def evidence_of(epoch: Epoch, host: Host, kind: str, message: Mapping[str, Any]) -> ev.Evidence | None:
    """What `worker_exit`, `service_exit` or `error` of a member means; None where it is no fault."""
    # What the host told of an older epoch's worker is no place of this one.
    told = host.progress if host.progress.get("epoch") == epoch.number else {}
    place: dict[str, Any] = {
        "section": message.get("section", told.get("section", ev.START)),
        "step": message.get("step", told.get("step", epoch.start_step)),
    }
    if place["section"] not in ev.SECTIONS:
        place["section"] = ev.START
    code, number = message.get("code"), message.get("signal")
    if kind == "service_exit":
        # Ended by its own agent, or once the workers are through: no fault.
        is_over = bool(message.get("fenced", False)) or bool(epoch.ended)
        return None if is_over else ev.EpochHostLost(host.name, epoch.number, code, number)
    rank = epoch.world.members.index(host.name) if host.name in epoch.world.members else -1
    words: dict[str, Any] = {
        "error_class": str(message.get("error_class", "")),
        "error_text": str(message.get("text", "")),
        "traceback": str(message.get("traceback", "")),
        "collective": bool(message.get("is_collective", False)),
    }
    if words["error_class"] == DAMAGED:
        first = words["error_text"].strip().splitlines()[-1:] or [""]
        return ev.ShardRejected(host.name, epoch.number, "memory", epoch.start_step, "memory", "several", first[0])
    if kind == "error":
        return ev.WorkerError(host.name, rank, epoch.number, **words, **place)
    if code in FINISHED and message.get("said") == "finished":
        return None
    if code is None and number is None:
        code = 255  # adopted by a later agent: nobody knows how it ended
    fenced, memory = (bool(message.get(name, False)) for name in ("fenced", "out_of_memory"))
    return ev.WorkerExit(
        host.name, rank, epoch.number, code, number, fenced=fenced, out_of_memory=memory, **words, **place
    )


def rejection_of(epoch: Epoch, message: Mapping[str, Any]) -> tuple[Damaged, Note]:
    """A shard that a worker found damaged while it restored: what the next choice must avoid, and its event."""
    box = tuple((int(start), int(stop)) for start, stop in message["box"])
    choice = epoch.choice or {"step": -1, "epoch": -1}
    holder, file, path = message["holder"], message["file"], message["path"]
    fields = {"tier": "memory", "step": choice["step"], "path": f"{holder}:{file}", "shard": f"{path} {box}"}
    note = Note("rejected", fields | {"reason": message["reason"]})
    return Damaged(holder, file, choice["step"], choice["epoch"], path, box), note
