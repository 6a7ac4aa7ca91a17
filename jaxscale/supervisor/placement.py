"""Where the copies of a host's memory slots go: to other failure domains first. Pure.

With r copies at r different hosts any r hosts may be lost at once. A copy in another slice also survives the loss of a
whole slice, so those come first; among them the host at the same place in its slice, which spreads the load evenly.
Read next: `copier.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def buddies(host: str, members: Sequence[str], slices: Mapping[str, int], replicas: int) -> tuple[str, ...]:
    """The `replicas` members that hold copies of `host`'s slots; fewer where there are not so many others."""
    by_slice: dict[int, list[str]] = {}
    for name in members:
        by_slice.setdefault(slices[name], []).append(name)
    order = sorted(by_slice)
    mine = order.index(slices[host])
    place = by_slice[slices[host]].index(host)

    def key(name: str) -> tuple[int, int, int]:
        there = by_slice[slices[name]]
        slice_distance = (order.index(slices[name]) - mine) % len(order)
        place_distance = (there.index(name) - place) % len(there)
        # Another slice before the own one; then the same place; then the next slice.
        return (slice_distance == 0, place_distance, slice_distance)

    return tuple(sorted((name for name in members if name != host), key=key)[:replicas])
