"""How far apart the durable steps of a supervised run are where the recipe leaves it open. Pure; one for a coordinator.

Training does not wait for them (`persisting.py`), so what a save costs is how much the writing slows it; only losses
that took the run back to the durable tier count as failures here. Read next: `../checkpoint/interval.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxscale.checkpoint.interval import SaveCosts, allowed, is_noticeable


@dataclass
class DurablePace:
    """From durable step to durable step, whatever the epoch. Times are seconds of one clock."""

    at_most: float
    """The recipe's bound."""
    age: float = 0.0
    """Of the newest durable step, when training begins; 0 where there is none."""
    began: float | None = None
    """When it began: what is formed, restored and compiled before is no training."""
    newest: float = 0.0
    """When the newest durable step came to exist; where there is none, when training began."""
    failures: int = 0
    """How often the run went back to the durable tier."""
    costs: SaveCosts = field(default_factory=SaveCosts)
    told: float = 0.0
    """Interval that people have heard of."""
    is_late: bool = False
    """Whether that was said of the newest durable step."""

    def begins(self, now: float) -> None:
        """Training begins, or goes on. An old step is to be followed by another at once, and is not late yet."""
        if self.began is None:
            self.began, self.newest = now, now - min(self.age, self.at_most)

    def seconds(self, now: float) -> float:
        """From one to the next."""
        return self.costs.seconds_between(
            self.at_most, now - (now if self.began is None else self.began), self.failures
        )

    def is_due(self, now: float) -> bool:
        return self.began is not None and now - self.newest >= self.seconds(now)

    def sealed(self, seconds: float, now: float) -> None:
        """A step that took `seconds` has come to exist."""
        self.newest, self.is_late = now, False
        self.costs = self.costs.with_save(0.0, seconds)

    def news(self, now: float) -> float | None:
        """An interval that people have not heard of; None where there is none."""
        seconds = self.seconds(now)
        if not is_noticeable(seconds, self.told):
            return None
        self.told = seconds
        return seconds

    def becomes_late(self, now: float) -> bool:
        """Whether the newest durable step is too old; True once for each."""
        if self.began is None or self.is_late or now - self.newest <= allowed(self.at_most):
            return False
        self.is_late = True
        return True
