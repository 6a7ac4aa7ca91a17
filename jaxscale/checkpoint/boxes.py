"""Boxes: which part of an array a shard holds, as a range of global indices per dim. Pure Python, no arrays.

A box is `((start, stop), ...)`, one pair for each dim; that of a scalar is `()`. Boxes do not depend on a mesh, so a
state that was written as the shards of one mesh is read as the shards of another by intersecting boxes. Read next:
`slot.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

Box = tuple[tuple[int, int], ...]


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box of a JAX shard's `index` (slices; None means from the start, or to the end) in an array of this shape.

    Raises ValueError for a step other than 1, or another number of dims.
    """
    if len(index) != len(shape):
        raise ValueError(f"an index of {len(index)} slices into an array of {len(shape)} dims, {list(shape)}")
    box = []
    for part, size in zip(index, shape, strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"{part} skips elements; a shard is a range of each dim")
        box.append((start, max(start, stop)))
    return tuple(box)


def whole(shape: Sequence[int]) -> Box:
    """The box of all of an array."""
    return tuple((0, size) for size in shape)


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of what a box holds."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """The number of elements in a box; 1 for a scalar's."""
    return math.prod(lengths(box))


def fits(box: Box, shape: Sequence[int]) -> bool:
    """Whether a box lies inside an array of this shape. Empty ranges are allowed, backward ones are not."""
    return len(box) == len(shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True)
    )


def intersect(one: Box, other: Box) -> Box | None:
    """What two boxes of one array share, or None where that is no element."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def within(part: Box, box: Box) -> tuple[slice, ...]:
    """The slices that cut `part` out of an array that holds `box`; `part` lies inside it."""
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(part, box, strict=True))


def text(box: Box) -> str:
    """A box for people: `[0:8, 16:32]`."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"


def uncovered(target: Box, boxes: Iterable[Box]) -> Box | None:
    """A part of `target` that none of the boxes holds; None when they hold all of it together.

    The boxes may overlap, repeat, and reach beyond the target. Sweeps over the first dim and solves the slab between
    two neighbouring edges in the remaining dims, each distinct slab once: n boxes in a regular grid cost some n log n
    steps.
    """
    if volume(target) == 0:
        return None
    return _gap(target, {shared for box in boxes if (shared := intersect(target, box)) is not None})


def _gap(target: Box, boxes: set[Box]) -> Box | None:
    """`uncovered` for boxes with elements that lie inside a target with elements."""
    if target in boxes:  # also where no dim is left: then the only box there can be is ()
        return None
    if not boxes or not target:
        return target
    (low, high), rest = target[0], target[1:]
    starts, stops = _by_edge(boxes, 0), _by_edge(boxes, 1)
    edges = sorted({low, high, *starts, *stops})
    open_now: dict[Box, int] = {}  # the boxes across the slab, without this dim -> how many of them are equal there
    solved: dict[Hashable, Box | None] = {}
    for left, right in itertools.pairwise(edges):
        for box in stops.get(left, ()):
            open_now[box] -= 1
            if not open_now[box]:
                del open_now[box]
        for box in starts.get(left, ()):
            open_now[box] = open_now.get(box, 0) + 1
        slab = frozenset(open_now)
        if slab not in solved:
            solved[slab] = _gap(rest, set(slab))
        gap = solved[slab]
        if gap is not None:
            return ((left, right), *gap)
    return None


def _by_edge(boxes: set[Box], side: int) -> dict[int, list[Box]]:
    edges: dict[int, list[Box]] = {}
    for box in boxes:
        edges.setdefault(box[0][side], []).append(box[1:])
    return edges
