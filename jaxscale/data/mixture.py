"""Which window of which source a global row is: a deterministic function of the row, through Grain's `MapDataset`.

Every source is read in passes; a pass gives each window once, in an order of its own. Sources are interleaved by weight
as evenly as whole rows allow, so after any number of rows each has its share to within a few rows. Read next:
`position.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import grain  # type: ignore[import-untyped]  # no stubs

_SHARES = 1 << 32


@dataclass(frozen=True)
class Proportions:
    """Deals rows out to sources by weight. Exact integer arithmetic: equal on every machine, for any row."""

    weights: tuple[float, ...]
    consumed: tuple[int, ...]
    """Rows each source gave before row 0 of this mixture."""

    @cached_property
    def _shares(self) -> tuple[int, ...]:
        total = sum(self.weights)
        return tuple(max(1, round(weight / total * _SHARES)) for weight in self.weights)

    def counts(self, rows: int) -> tuple[int, ...]:
        """Rows of each source, `consumed` included, after `rows` rows of the mixture.

        Source after source takes its share of what the ones before left, rounded up. Each count grows with `rows`, and
        one row moves exactly one of them.
        """
        out, left, remaining = [], rows, sum(self._shares)
        for share, before in zip(self._shares, self.consumed, strict=True):
            rest = left * (remaining - share) // remaining
            out.append(before + left - rest)
            left, remaining = rest, remaining - share
        return tuple(out)

    def __getitem__(self, row: int) -> tuple[int, int]:
        """(source, which of the source's rows) of row `row` of the mixture."""
        left, remaining = row, sum(self._shares)
        for source, share in enumerate(self._shares):
            rest = left * (remaining - share) // remaining
            if rest == (left + 1) * (remaining - share) // remaining:
                return source, self.consumed[source] + left - rest
            left, remaining = rest, remaining - share
        raise AssertionError("the last source takes all that is left")

    def __len__(self) -> int:
        return sys.maxsize


def source_seed(seed: int, content: str, generation: int) -> int:
    """Shuffle seed of a source, from what is in it and not where it lies or which other sources there are."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{content}/{generation}".encode()) % 2**32


def make_references(
    windows: Sequence[int], seeds: Sequence[int], proportions: Proportions, shuffle: bool
) -> grain.MapDataset[int]:
    """Element r = the window that row r of the mixture is.

    `windows`: how many each source has; they are numbered through, source after source. `seeds`: one per source.
    """
    import grain

    parts, first = [], 0
    for count, seed in zip(windows, seeds, strict=True):
        part = grain.MapDataset.range(first, first + count)
        parts.append((part.shuffle(seed=seed) if shuffle else part).repeat(None))
        first += count
    # Ours instead of MapDataset.mix: exact weights, counts in closed form, and a start in the middle of each source.
    return grain.MapDataset.select_from_datasets(parts, _selection(proportions))


def _selection(proportions: Proportions) -> grain.transforms.DatasetSelectionMap:
    import grain

    class Selection(grain.transforms.DatasetSelectionMap):
        def __len__(self) -> int:
            return len(proportions)

        def __getitem__(self, index: int) -> tuple[int, int]:
            return proportions[index]

    return Selection()
