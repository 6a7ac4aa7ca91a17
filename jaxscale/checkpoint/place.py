"""A place with checkpoints as a command names it: a run directory, or an address that a run copies its steps to.

Reads nothing but names and the run's settings; imports no JAX. Read next: `listing.py`, `verify.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import layout, step_copy
from jaxscale.config_error import ConfigError
from jaxscale.storage.addresses import open_store
from jaxscale.storage.guarded import Bounds, GuardedStore
from jaxscale.storage.local_store import LocalStore
from jaxscale.storage.store import Store

CONFIG, EVENTS = "config.json", "events.jsonl"
BOUNDS = Bounds(attempt_seconds=10.0, call_seconds=30.0)
"""Of the calls to a place that is no folder of this machine: a command waits no longer."""


class PlaceError(ConfigError):
    """No place with checkpoints, or not one of what was asked for. The message says why, and what to give."""


@dataclass(frozen=True)
class Place:
    """Steps lie in `checkpoints/<step>/` below it."""

    store: Store
    run: Path | None
    """Its folder on this machine; None where it is none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """`checkpoint` of the run's config, as far as it could be read."""

    @property
    def address(self) -> str:
        return self.store.address

    @property
    def folder(self) -> Path | None:
        """Its checkpoints, where they lie on this machine."""
        return None if self.run is None else self.run / step_copy.CHECKPOINTS

    def steps(self) -> list[int]:
        """Every step that there is something of, in growing order. Raises OSError."""
        return step_copy.present(self.store)

    def known(self, step: int | None) -> list[int]:
        """Just this step, or all for None. Raises PlaceError where there is no such step, or none at all."""
        steps = self.steps()
        if not steps:
            raise PlaceError(
                f"{self.address} has no checkpoint; a run saves one every checkpoint.every steps, at its end, and when "
                "Ctrl-C stops it"
            )
        if step is not None and step not in steps:
            raise PlaceError(f"{self.address} has no checkpoint of step {step}; it has {_short(steps)}")
        return steps if step is None else [step]


def open_place(run: str) -> Place:
    """A run directory, or an address with copies of its steps: a folder, `s3://bucket/prefix`, what fsspec opens.

    Raises PlaceError for what is neither, StoreError for an address that cannot be used, OSError where it fails.
    """
    if "://" in run and not run.startswith("file://"):
        store: Store = GuardedStore(open_store(run), BOUNDS)
        if not step_copy.present(store):
            raise PlaceError(f"{run} has no checkpoint: nothing lies below {run.rstrip('/')}/checkpoints/")
        return Place(store, None, _settings_there(store))
    store = open_store(run)
    folder = Path(store.address)
    if (folder / layout.MANIFEST).is_file():
        raise PlaceError(
            f"{run} is one step's folder; give the run directory {folder.parent.parent}, and --step {folder.name}"
        )
    if not any((folder / name).exists() for name in (CONFIG, EVENTS, step_copy.CHECKPOINTS)):
        what = f"has neither {CONFIG} nor checkpoints/" if folder.is_dir() else "is a file"
        what = what if folder.exists() else "is not there"
        raise PlaceError(
            f"{run} is not a run directory: it {what}; give the --run.dir of a run, or one of its locations"
        )
    return Place(store, folder, _settings(folder / CONFIG) or _settings_there(store))


def local(place: Place, what: str) -> Path:
    """The run's folder, for a command that changes it. Raises PlaceError where it is none of this machine."""
    if place.run is None or not isinstance(place.store, LocalStore):
        raise PlaceError(f"{place.address} is no run directory on this machine; `checkpoints {what}` needs one")
    return place.run


def further(place: Place) -> list[str]:
    """Addresses of the run's further locations."""
    named = place.settings.get("locations", ())
    return [one for one in named if isinstance(one, str) and one] if isinstance(named, list | tuple) else []


def whole(place: Place, name: str, default: int) -> int:
    """A whole number among the run's settings; the default where it has none, or something else."""
    found = place.settings.get(name)
    return found if type(found) is int and found >= 0 else default


def _settings(path: Path) -> dict[str, Any]:
    try:
        return _of_config(path.read_bytes())
    except OSError:
        return {}


def _settings_there(store: Store) -> dict[str, Any]:
    """Of the newest step that says."""
    for step in reversed(step_copy.present(store)):
        try:
            return _of_config(store.read(f"{step_copy.CHECKPOINTS}/{step}/{CONFIG}"))
        except OSError:
            continue
    return {}


def _of_config(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)["checkpoint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[-10:]))
    return f"{shown} and {len(steps) - 10} older ones" if len(steps) > 10 else shown
