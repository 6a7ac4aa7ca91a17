"""How often something may go wrong before it is not tried again: strikes per cause and per host, paid back by progress.

A run of weeks sees hundreds of faults and must survive them all; a run that fails in the same place again and again
must end soon. Time is no measure for that, progress is: strikes are taken back for steps that had never been done
before, and for the seconds that such steps took. Read next: `policy.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MEMORY = 64
"""Fingerprints that are remembered."""


@dataclass(frozen=True)
class Mark:
    """How far training has come. Grows only: a step that is replayed after a restore counts once."""

    step: int = 0
    """The highest step that was ever done."""
    seconds: float = 0.0
    """Spent on the steps that count, altogether."""


@dataclass(frozen=True)
class Allowance:
    """A budget: `strikes` faults, one of which is paid back by so many new steps, or by so many seconds of them."""

    strikes: int
    steps: int
    seconds: float

    def __post_init__(self) -> None:
        if self.strikes < 0 or self.steps < 1 or self.seconds <= 0:
            raise ValueError(f"{self}: strikes must be >= 0, steps >= 1 and seconds > 0")


@dataclass(frozen=True)
class Account:
    """Strikes of one cause or host, and from which mark on progress pays them back."""

    strikes: int
    since: Mark

    def at(self, mark: Mark, allowance: Allowance) -> Account:
        """After the progress up to `mark`. What is left over of a strike's price is kept."""
        by_steps = (mark.step - self.since.step) // allowance.steps
        by_seconds = int((mark.seconds - self.since.seconds) // allowance.seconds)
        paid = max(by_steps, by_seconds, 0)
        if paid >= self.strikes:
            return Account(0, mark)
        since = Mark(
            self.since.step + min(paid * allowance.steps, max(0, mark.step - self.since.step)),
            self.since.seconds + min(paid * allowance.seconds, max(0.0, mark.seconds - self.since.seconds)),
        )
        return Account(self.strikes - paid, since)


@dataclass(frozen=True)
class Seen:
    """A failure that was seen before."""

    count: int
    """How often in a row, without progress in between."""
    mark: Mark
    """When it was last seen."""


@dataclass(frozen=True)
class History:
    """What the policy remembers of earlier faults. Immutable; JSON-safe, for the log and for a coordinator's heir."""

    causes: Mapping[str, Account] = field(default_factory=dict)
    hosts: Mapping[str, Account] = field(default_factory=dict)
    fingerprints: Mapping[str, Seen] = field(default_factory=dict)
    """Oldest first."""

    def cause_strikes(self, cause: str, mark: Mark, allowance: Allowance) -> int:
        """Faults of this cause that progress has not paid back."""
        account = self.causes.get(cause)
        return account.at(mark, allowance).strikes if account is not None else 0

    def host_strikes(self, host: str, mark: Mark, allowance: Allowance) -> int:
        """Faults that this host caused and progress has not paid back."""
        account = self.hosts.get(host)
        return account.at(mark, allowance).strikes if account is not None else 0

    def repeats(self, fingerprint: str, mark: Mark) -> int:
        """How often this very failure was seen since training last got further than now."""
        seen = self.fingerprints.get(fingerprint)
        return seen.count if seen is not None and mark.step <= seen.mark.step else 0

    def charged(
        self,
        mark: Mark,
        causes: Mapping[str, Allowance],
        hosts: Iterable[str],
        host_allowance: Allowance,
        fingerprints: Iterable[str],
    ) -> History:
        """With one more strike for each of these."""
        more = {cause: _struck(self.causes.get(cause), mark, allowance) for cause, allowance in causes.items()}
        struck = {host: _struck(self.hosts.get(host), mark, host_allowance) for host in hosts}
        seen = dict(self.fingerprints)
        for fingerprint in fingerprints:
            again = Seen(self.repeats(fingerprint, mark) + 1, mark)
            seen.pop(fingerprint, None)
            seen[fingerprint] = again
        kept = dict(list(seen.items())[-MEMORY:])
        return History({**self.causes, **more}, {**self.hosts, **struck}, kept)

    def forgiven(self, host: str) -> History:
        """Without the strikes of a host that was repaired or exchanged under the same name."""
        return replace(self, hosts={name: account for name, account in self.hosts.items() if name != host})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> History:
        """What `to_json` gave."""
        return cls(
            {name: Account(a["strikes"], Mark(**a["since"])) for name, a in data["causes"].items()},
            {name: Account(a["strikes"], Mark(**a["since"])) for name, a in data["hosts"].items()},
            {name: Seen(s["count"], Mark(**s["mark"])) for name, s in data["fingerprints"].items()},
        )


def _struck(account: Account | None, mark: Mark, allowance: Allowance) -> Account:
    if account is None:
        return Account(1, mark)
    now = account.at(mark, allowance)
    return Account(now.strikes + 1, mark if now.strikes == 0 else now.since)
