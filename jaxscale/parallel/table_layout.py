"""Where the rows of embedding tables lie: three placements as pure arithmetic on sizes, the same on every mesh.

    row      all tables in one array (R, D); its rows are split, neighbours far apart, so hot ids are on all devices
    column   all tables in one array (R, D); its columns are split, each device has a part of every row
    table    whole tables dealt out over bins, as (bins, R, D); each device has some bins

No layout depends on the number of devices: a checkpoint moves to any mesh that divides it. Read next: `table.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Placement = Literal["row", "column", "table"]
PLACEMENTS: tuple[Placement, ...] = ("row", "column", "table")

STRIPES = 3 * 1024
"""Row-wise tables are split by any number of devices that divides this."""


@dataclass(frozen=True)
class Feature:
    """One categorical feature with its table: `rows` ids, and `hots` ids an example at most (a bag)."""

    rows: int
    hots: int = 1


def padded_rows(rows: int) -> int:
    """Rows of a row-wise array: filled up to a multiple of STRIPES."""
    return -(-rows // STRIPES) * STRIPES


def stripe_order() -> np.ndarray:
    """(STRIPES,) int32: where the stripe of ids with remainder i lies. Neighbouring remainders lie far apart.

    The binary digits of i modulo 1024 reversed (van der Corput's sequence): any contiguous part of the stripes, a
    device's, has its share of any range of ids, of the hot ones at the beginning too.
    """
    i = np.arange(STRIPES)
    low, reversed_low = i % 1024, np.zeros(STRIPES, np.int64)
    for bit in range(10):
        reversed_low |= ((low >> bit) & 1) << (9 - bit)
    return (reversed_low * (STRIPES // 1024) + i // 1024).astype(np.int32)


def stripe_rows(stacked: np.ndarray, total: int) -> np.ndarray:
    """Rows of a row-wise array of `total` rows where these rows of all tables one after the other lie."""
    return stripe_order()[stacked % STRIPES] * (total // STRIPES) + stacked // STRIPES


def deal(costs: Sequence[float], bins: int) -> tuple[tuple[int, ...], ...]:
    """Whole tables to bins: the dearest first, each to the bin with the least so far (Graham 1969: at most 4/3 - 1/3n
    of the best). Equal costs go in order; a bin may stay empty.
    """
    dealt: list[list[int]] = [[] for _ in range(bins)]
    load = [0.0] * bins
    for table in sorted(range(len(costs)), key=lambda t: (-costs[t], t)):
        least = min(range(bins), key=lambda b: (load[b], len(dealt[b]), b))
        dealt[least].append(table)
        load[least] += costs[table]
    return tuple(tuple(sorted(tables)) for tables in dealt)


@dataclass(frozen=True)
class Bags:
    """Some features of a model, in order, whose ids lie one after the other: example b has `ids[b, start:stop]`.

    The ids of an array (B, H), H = the sum of the hots; a negative id is padding.
    """

    features: tuple[Feature, ...]

    @cached_property
    def hots(self) -> int:
        return sum(feature.hots for feature in self.features)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Columns of the ids of each feature."""
        ends = np.cumsum([feature.hots for feature in self.features]).tolist()
        return tuple((end - feature.hots, end) for end, feature in zip(ends, self.features, strict=True))

    @cached_property
    def feature_of(self) -> np.ndarray:
        """(H,) which feature each column of ids belongs to."""
        return np.repeat(np.arange(len(self.features)), [feature.hots for feature in self.features])

    @cached_property
    def offsets(self) -> np.ndarray:
        """(F,) first row of each table when they lie one after the other."""
        rows = np.array([feature.rows for feature in self.features], np.int64)
        return np.cumsum(rows) - rows

    @cached_property
    def rows(self) -> int:
        return sum(feature.rows for feature in self.features)


@dataclass(frozen=True)
class Bins:
    """Tables dealt out over `bins`, as arrays that a program indexes. Legend: V bins, h ids and f features of a bin.

    All bins are as large as the largest one: what they have less is filled up, so that every device does the same.
    """

    bags: Bags
    bins: int

    @cached_property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """Features of each bin, dealt by the bytes of their tables."""
        return deal([feature.rows for feature in self.bags.features], self.bins)

    @cached_property
    def features(self) -> int:
        """Features of the bin that has most."""
        return max(1, *(len(tables) for tables in self.tables))

    @cached_property
    def hots(self) -> int:
        """Ids an example of the bin that has most."""
        return max(1, *(sum(self.bags.features[t].hots for t in tables) for tables in self.tables))

    @cached_property
    def rows(self) -> int:
        """Rows of the bin that has most."""
        return max(1, *(sum(self.bags.features[t].rows for t in tables) for tables in self.tables))

    @cached_property
    def place(self) -> np.ndarray:
        """(F, 2) bin and place in it of each feature."""
        place = np.zeros((len(self.bags.features), 2), np.int32)
        for number, tables in enumerate(self.tables):
            for at, table in enumerate(tables):
                place[table] = number, at
        return place

    @cached_property
    def feature(self) -> np.ndarray:
        """(V, f) which feature lies at each place, F where there is none."""
        out = np.full((self.bins, self.features), len(self.bags.features), np.int32)
        for number, tables in enumerate(self.tables):
            out[number, : len(tables)] = tables
        return out

    @cached_property
    def columns(self) -> np.ndarray:
        """(V, h) columns of the ids that each bin gets, H where there is none."""
        out = np.full((self.bins, self.hots), self.bags.hots, np.int32)
        for number, tables in enumerate(self.tables):
            mine = [column for table in tables for column in range(*self.bags.spans[table])]
            out[number, : len(mine)] = mine
        return out

    @cached_property
    def slot(self) -> np.ndarray:
        """(V, h) place among the bin's features that each id belongs to."""
        out = np.zeros((self.bins, self.hots), np.int32)
        for number, tables in enumerate(self.tables):
            mine = [at for at, table in enumerate(tables) for _ in range(self.bags.features[table].hots)]
            out[number, : len(mine)] = mine
        return out

    @cached_property
    def first_row(self) -> np.ndarray:
        """(V, h) row of the bin where the table of each id begins."""
        out = np.zeros((self.bins, self.hots), np.int32)
        for number, tables in enumerate(self.tables):
            rows = [self.bags.features[table].rows for table in tables]
            begins = np.cumsum([0, *rows[:-1]]).tolist() if rows else []
            mine = [b for b, table in zip(begins, tables, strict=True) for _ in range(self.bags.features[table].hots)]
            out[number, : len(mine)] = mine
        return out


@dataclass(frozen=True)
class Position:
    """Where row `row` of a feature's table lies in the array of its placement: a bin (0 without) and a row."""

    bin: int
    row: int


def position(bags: Bags, placement: Placement, bins: int, feature: int, row: int) -> Position:
    """For people, tests and exports; programs compute the same for whole batches."""
    if placement == "table":
        dealt = Bins(bags, bins)
        number = int(dealt.place[feature, 0])
        before = [t for t in dealt.tables[number] if t < feature]
        return Position(number, sum(bags.features[t].rows for t in before) + row)
    stacked = int(bags.offsets[feature]) + row
    if placement == "column":
        return Position(0, stacked)
    total = padded_rows(bags.rows)
    return Position(0, int(stripe_rows(np.array(stacked), total)))
