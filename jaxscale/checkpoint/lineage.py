"""Where a step comes from: data, config, code, mesh, and the checkpoints before it. No JAX. Read next: `card.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.track.jsonl import backwards

EVENTS = "events.jsonl"


def lineage_of(run: Path, step: int) -> dict[str, Any]:
    """Plain values; what its files do not say is None. Raises DamagedCheckpoint.

    `parents`: the checkpoints whose states went into it, the nearest first: of this run where it went on from one, of
    another where its weights came from there. Each with the digest of its manifest, where it is still there.
    """
    path = layout.step_folder(run / "checkpoints", step)
    manifest, record = layout.read_manifest(path), layout.read_record(path)
    environment = record.environment
    return {
        "recipe": record.config.get("name"),
        "config_hash": manifest.facts.get("config_hash"),
        "data": dict(record.data),
        "rows": record.row,
        "epoch": record.epoch,
        "packages": dict(environment.get("packages") or {}),
        "git": dict(environment.get("git") or {}),
        "mesh": manifest.facts.get("mesh"),
        "parents": [*_restored(run, step, record.epoch), *_initial(record.config.get("init_from"))],
    }


def digest_of(run: Path, step: int) -> str:
    """Of a step's manifest: another save of the same step has another. Raises DamagedCheckpoint."""
    path = layout.step_folder(run / "checkpoints", step)
    layout.read_manifest(path)  # it has the digest that it says
    try:
        return str(json.loads((path / layout.MANIFEST).read_bytes())["digest"])
    except OSError as error:
        raise DamagedCheckpoint(f"{path / layout.MANIFEST} cannot be read ({error.strerror})") from error


def _restored(run: Path, step: int, epoch: int) -> list[dict[str, Any]]:
    """From the run's events: the durable steps that the starts up to the one that saved this step went on from."""
    found, below = [], step
    try:
        for event in backwards(run / EVENTS):
            at: Any = event.get("step")
            is_earlier = type(at) is int and 0 < at < below and event.get("epoch", 0) <= epoch
            if event.get("kind") == "restored" and is_earlier and "durable" in (event.get("sources") or {}):
                found.append({"run": run.name, "step": at, "digest": _digest(run, at)})
                below = at
    except (OSError, TypeError):  # what can be told is told
        return found
    return found


def _initial(init_from: Any) -> list[dict[str, Any]]:
    """RUN@STEP, or RUN, of the config."""
    if not isinstance(init_from, str) or not init_from:
        return []
    name, _, step = init_from.rpartition("@") if init_from.rpartition("@")[2].isdigit() else (init_from, "", "")
    number = int(step) if step else None
    return [{"run": name, "step": number, "digest": None if number is None else _digest(Path(name), number)}]


def _digest(run: Path, step: int) -> str | None:
    try:
        return digest_of(run, step)
    except DamagedCheckpoint:
        return None


def as_text(data: Any) -> str:
    """Identities of data as one line."""
    return json.dumps(data, sort_keys=True, default=dict)
