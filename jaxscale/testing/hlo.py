"""Reads the collectives out of compiled HLO, so that tests can say which ones a program has, and over which mesh axes.

Read next: `tests/contracts/test_collectives.py`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(-start)?\((?P<rest>.*)$", re.MULTILINE)
_ARRAY = re.compile(r"[a-z0-9]+\[([0-9,]*)\]")

Collective = tuple[str, tuple[str, ...], tuple[int, ...]]
"""Kind, mesh axes it runs over, shape of the result on one device."""


def collectives(hlo: str, sizes: Mapping[str, int]) -> Counter[Collective]:
    """How often each collective stands in the program text (a loop's body stands there once).

    sizes: the mesh axes in device order. Operands that XLA combined into one call count one each. Collectives over one
    device only move nothing and are left out. Raises ValueError for groups of devices that are no set of mesh axes.
    """
    by_groups = _groups_of_axes(sizes)
    found: Counter[Collective] = Counter()
    for call in _CALL.finditer(hlo):
        groups = frozenset(_groups(call["kind"], call["rest"], math.prod(sizes.values())))
        if all(len(group) == 1 for group in groups):
            continue
        if call["kind"] == "collective-permute":
            axes: tuple[str, ...] = next(a for g, a in by_groups.items() if all(any(p <= m for m in g) for p in groups))
        elif groups in by_groups:
            axes = by_groups[groups]
        else:
            raise ValueError(f"{call['kind']} over {sorted(map(sorted, groups))}, which are no axes of {dict(sizes)}")
        for dims in _ARRAY.findall(call["result"]):
            found[call["kind"], axes, tuple(int(d) for d in dims.split(",") if d)] += 1
    return found


def by_axis(found: Counter[Collective], at_least: int = 0) -> dict[tuple[str, tuple[str, ...]], int]:
    """(kind, axes) -> count, of the collectives whose result has at least this many elements."""
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for (kind, axes, shape), count in found.items():
        if math.prod(shape) >= at_least:
            counts[kind, axes] += count
    return dict(counts)


def _groups_of_axes(sizes: Mapping[str, int]) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    """Groups of devices -> the mesh axes along which they lie, smallest sets of axes first."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    names = [axis for axis, size in sizes.items() if size > 1]
    table: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            table.setdefault(frozenset(_along(ids, [list(sizes).index(axis) for axis in chosen])), chosen)
    return table


def _along(ids: np.ndarray, dims: list[int]) -> Iterator[frozenset[int]]:
    size = math.prod(ids.shape[d] for d in dims)
    moved = np.moveaxis(ids, dims, range(ids.ndim - len(dims), ids.ndim)).reshape(-1, size)
    return (frozenset(group.tolist()) for group in moved)


def _groups(kind: str, text: str, devices: int) -> Iterator[frozenset[int]]:
    """Device groups in the ways that HLO writes them: lists, iota with transposition, and named mesh axes."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        assert pairs is not None, text[:200]
        yield from (frozenset(map(int, p.split(","))) for p in re.findall(r"\{?(\d+,\d+)", pairs[1]))
        return
    if named := re.search(r"replica_groups=@?mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[2])]
        yield from _along(np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values())), chosen)
        return
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(devices).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        yield from (frozenset(group.tolist()) for group in ids.reshape(shape))
        return
    listed = re.search(r"replica_groups=\{(.*?)\}\}", text)
    if listed is None:
        yield frozenset(range(devices))
        return
    yield from (frozenset(map(int, g.split(","))) for g in re.findall(r"\{?([\d,]+)", listed[1]) if g.strip(","))
