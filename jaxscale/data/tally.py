"""What became of every document of a build, by input and reason, with examples.

Read next: `manifest.py`, which keeps it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxscale.data.blocks import Problem
from jaxscale.data.tokenise import Places

EXACT, NEAR = "exact-duplicate", "near-duplicate"
REASONS = ("", EXACT, NEAR)
"""By the verdict of `Duplicates.judge`."""
EXAMPLES = 5
"""Kept of each reason: the first ones."""


@dataclass
class Counts:
    """What became of the documents of one input."""

    documents: int = 0
    """Kept."""
    tokens: int = 0
    bytes: int = 0
    """UTF-8, of the text of what was kept."""
    longest: int = 0
    """Tokens of the longest document, its end included."""
    quarantined: int = 0
    """Records that could not be used; the lost rest of an input counts as one."""
    lost: int = 0
    """Bytes as stored that were not read, because the input breaks off."""
    dropped: dict[str, int] = field(default_factory=dict)
    """By reason: the filter's name, `exact-duplicate` or `near-duplicate`."""

    @property
    def read(self) -> int:
        """Records seen."""
        return self.documents + self.quarantined + sum(self.dropped.values())


@dataclass
class Tally:
    """Counts of all inputs that something was read of, by their number, and the first documents that were dropped."""

    by_input: dict[int, Counts] = field(default_factory=dict)
    examples: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By reason: input and record, in the order of the input."""

    def keep(self, places: Places, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """tokens, sizes: (documents,) tokens and bytes of each."""
        for number, first, stop in _runs(places.inputs):
            counts = self._of(number)
            counts.documents += stop - first
            counts.tokens += int(tokens[first:stop].sum())
            counts.bytes += int(sizes[first:stop].sum())
            counts.longest = max(counts.longest, int(tokens[first:stop].max()))

    def drop(self, reason: str, places: Places) -> None:
        for number, first, stop in _runs(places.inputs):
            dropped = self._of(number).dropped
            dropped[reason] = dropped.get(reason, 0) + stop - first
        shown = self.examples.setdefault(reason, []) if len(places.inputs) else []
        room = EXAMPLES - len(shown)
        shown += zip(places.inputs[:room].tolist(), places.records[:room].tolist(), strict=True)

    def quarantine(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            counts = self._of(problem.input)
            counts.quarantined += 1
            counts.lost += problem.lost

    @property
    def total(self) -> Counts:
        """Of all inputs."""
        total = Counts()
        for counts in self.by_input.values():
            for name in ("documents", "tokens", "bytes", "quarantined", "lost"):
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            total.longest = max(total.longest, counts.longest)
            for reason, count in counts.dropped.items():
                total.dropped[reason] = total.dropped.get(reason, 0) + count
        return total

    def _of(self, number: int) -> Counts:
        return self.by_input.setdefault(number, Counts())


def encode(tally: Tally) -> dict[str, Any]:
    """As plain values."""
    return {
        "by_input": {str(number): dataclasses.asdict(counts) for number, counts in tally.by_input.items()},
        "examples": tally.examples,
    }


def decode(raw: Mapping[str, Any]) -> Tally:
    """What `encode` wrote. Raises TypeError, ValueError or KeyError for anything else."""
    return Tally(
        {int(number): Counts(**counts) for number, counts in raw["by_input"].items()},
        {reason: [(place[0], place[1]) for place in shown] for reason, shown in raw["examples"].items()},
    )


def _runs(inputs: np.ndarray) -> list[tuple[int, int, int]]:
    """(number, first, stop) of each run of the same input."""
    if not len(inputs):
        return []
    borders = [0, *(np.flatnonzero(np.diff(inputs)) + 1).tolist(), len(inputs)]
    return [(int(inputs[a]), a, b) for a, b in itertools.pairwise(borders)]
