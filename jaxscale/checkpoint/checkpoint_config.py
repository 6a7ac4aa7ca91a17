"""Settings of durable checkpoints: how often, how many, and where else. Read next: `durable.py`, `locations.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxscale.config_error import require


@dataclass(frozen=True)
class CheckpointConfig:
    """Of the durable tier."""

    every: int | Literal["auto"] = "auto"
    """Steps between durable checkpoints; auto: as is worth their cost; 0 = only at the end and at a stop."""
    apart: float = 1800.0
    """Seconds from one durable checkpoint to the next, at most, where `every` is auto; an older one is an alarm."""
    keep: int = 10
    """Newest checkpoints kept, in the run directory and at each further location; fewer where the disk is short."""
    milestones: int = 0
    """Checkpoints of steps that are multiples of this are kept for ever; 0 = none."""
    locations: tuple[str, ...] = ()
    """Further places that checkpoints are copied to: folders, s3://bucket/prefix, gs://bucket/prefix, ..."""
    alarm_after: float = 900.0
    """Seconds that the newest checkpoint at a location may be old while there is a newer one; then an alarm."""

    def __post_init__(self) -> None:
        require(
            self.every == "auto" or self.every >= 0,
            f"checkpoint.every is {self.every}; use auto, 0 (only at the end) or more",
        )
        require(self.apart > 0, f"checkpoint.apart is {self.apart}; use a positive number of seconds")
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; keep at least 1")
        require(self.milestones >= 0, f"checkpoint.milestones is {self.milestones}; use 0 (none) or a number of steps")
        require(self.alarm_after > 0, f"checkpoint.alarm-after is {self.alarm_after}; use a positive number of seconds")
        require(all(self.locations), "checkpoint.locations has an empty address; leave it out, or give a place")
        require(
            len(set(self.locations)) == len(self.locations),
            f"checkpoint.locations names a place twice: {', '.join(self.locations)}",
        )
