"""How the further places of a run's checkpoints stand, as `locations.json` in the run directory says.

Read next: `../checkpoint/location.py`, which writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATES = "locations.json"


@dataclass(frozen=True)
class LocationStatus:
    """One place. Ages in seconds; None: there is no such thing."""

    address: str
    step: int | None
    """The newest complete one there."""
    age_seconds: float | None
    """Since that step was sealed in the run directory."""
    behind: int
    """Steps that training is ahead of it."""
    failing_seconds: float | None
    reason: str
    """What fails; where the place is lost, who has it now."""
    lost: bool
    """Whether another job has taken the place."""


def read_locations(run: Path, step: int, now: float) -> tuple[LocationStatus, ...]:
    """`step`: that training has reached. `now`: seconds since 1970. Empty where nothing, or nothing whole, says it."""
    try:
        found = json.loads((run / STATES).read_bytes())
        return tuple(_status(one, step, now) for one in found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ()


def _status(one: Mapping[str, Any], step: int, now: float) -> LocationStatus:
    newest, sealed, failing = one.get("step"), one.get("sealed"), one.get("failing_since")
    return LocationStatus(
        address=str(one["address"]),
        step=None if newest is None else int(newest),
        age_seconds=None if sealed is None else max(0.0, now - float(sealed)),
        behind=max(0, step - int(newest or 0)),
        failing_seconds=None if failing is None else max(0.0, now - float(failing)),
        reason=str(one.get("reason", "")),
        lost=bool(one.get("lost")),
    )
