"""Which mesh axes a collective of a compiled program runs over, read from its groups of devices. Pure.

Read next: `traffic.py`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Of collectives, as HLO calls them."""


def axes_of(kind: str, attributes: str, sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    """The mesh axes that a collective runs over; None where its groups have one device each and nothing moves.

    attributes: what stands behind its operands. sizes: the mesh axes in device order. Groups may be parts of axes, as
    pairs of a permutation are; it is the fewest axes that hold them whole.
    """
    by_groups = _groups_of_axes(tuple(sizes.items()))
    groups = frozenset(_groups(kind, attributes, math.prod(sizes.values())))
    if all(len(group) == 1 for group in groups):
        return None
    if groups in by_groups:
        return by_groups[groups]
    return next(a for g, a in by_groups.items() if all(any(part <= whole for whole in g) for part in groups))


def group_size(kind: str, attributes: str, devices: int) -> int:
    """How many devices take part in one of the groups."""
    return max(len(group) for group in _groups(kind, attributes, devices))


@lru_cache
def _groups_of_axes(sizes: tuple[tuple[str, int], ...]) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    """Groups of devices -> the mesh axes along which they lie, smallest sets of axes first."""
    all_names = [axis for axis, _ in sizes]
    ids = np.arange(math.prod(size for _, size in sizes)).reshape(tuple(size for _, size in sizes))
    names = [axis for axis, size in sizes if size > 1]
    table: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            table.setdefault(frozenset(_along(ids, [all_names.index(axis) for axis in chosen])), chosen)
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
