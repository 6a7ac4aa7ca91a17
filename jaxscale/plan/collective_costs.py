"""What a collective costs on links of a known latency and bandwidth, and which way of summing is the cheapest. Pure.

A message of n bytes takes `latency + n / bandwidth` seconds (Hockney 1994); all devices of a group send at once, each
over its own link. Formulas after Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication
Operations in MPICH". Read next: `../commands/bench.py`, which measures links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A device's link to its neighbours along one mesh axis, in one direction."""

    latency: float
    """Seconds that a message takes however short it is."""
    bandwidth: float
    """Bytes a second."""

    def seconds(self, nbytes: float) -> float:
        """Of one message."""
        return self.latency + nbytes / self.bandwidth


ROUNDS_AND_SHARES = {
    "all-reduce": lambda p: (2 * (p - 1), 2 * (p - 1) / p),
    "all-gather": lambda p: (p - 1, (p - 1) / p),
    "reduce-scatter": lambda p: (p - 1, (p - 1) / p),
    "all-to-all": lambda p: (p - 1, (p - 1) / p),
    "collective-permute": lambda _: (1, 1.0),
}
"""Kind -> devices p -> (messages one after the other, bytes that each device sends as a share of the whole array): as a
ring does it, which sends the least. The whole array is the larger side: what a gather gives, what a scatter takes."""


def sent_bytes(kind: str, nbytes: float, devices: int) -> float:
    """What each device sends in a collective over an array of `nbytes` (its larger side on one device)."""
    return nbytes * ROUNDS_AND_SHARES[kind](devices)[1] if devices > 1 else 0.0


def seconds(kind: str, nbytes: float, devices: int, link: Link) -> float:
    """Of a collective of `devices` in a ring."""
    if devices == 1:
        return 0.0
    rounds, share = ROUNDS_AND_SHARES[kind](devices)
    return float(rounds * link.latency + share * nbytes / link.bandwidth)


def ring(nbytes: float, devices: int, link: Link) -> float:
    """All-reduce as a reduce-scatter and a gather round a ring: the least bytes, and most messages."""
    return seconds("all-reduce", nbytes, devices, link)


def tree(nbytes: float, devices: int, link: Link) -> float:
    """All-reduce by recursive doubling: few messages, each of the whole array."""
    return math.ceil(math.log2(devices)) * link.seconds(nbytes) if devices > 1 else 0.0


def hierarchical(nbytes: float, inside: int, slices: int, fast: Link, slow: Link) -> float:
    """All-reduce over slices of `inside` devices: scattered inside, the shards summed across, gathered inside.

    Each of the `inside` devices sends its shard over a slow link of its own.
    """
    within = seconds("reduce-scatter", nbytes, inside, fast) + seconds("all-gather", nbytes, inside, fast)
    return within + best_flat(nbytes / inside, slices, slow)[1]


def best_flat(nbytes: float, devices: int, link: Link) -> tuple[str, float]:
    """(`ring` or `tree`, seconds) of the cheaper one over links that are all alike."""
    ways = {"ring": ring(nbytes, devices, link), "tree": tree(nbytes, devices, link)}
    name = min(ways, key=ways.__getitem__)
    return name, ways[name]


def best(nbytes: float, inside: int, slices: int, fast: Link, slow: Link) -> tuple[str, float]:
    """(`ring`, `tree` or `hierarchical`, seconds) of the cheapest all-reduce over all devices of some slices.

    A flat one is bound by its slowest link in each round.
    """
    worst = Link(max(fast.latency, slow.latency), min(fast.bandwidth, slow.bandwidth)) if slices > 1 else fast
    flat = best_flat(nbytes, inside * slices, worst)
    if slices == 1 or inside == 1:
        return flat
    return min(flat, ("hierarchical", hierarchical(nbytes, inside, slices, fast, slow)), key=lambda way: way[1])


def buckets(sizes: Sequence[float], most: float) -> list[list[int]]:
    """Indices of neighbouring arrays that go in one message of `most` bytes at most; a larger array goes alone."""
    found: list[list[int]] = []
    room = 0.0
    for index, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = most
        found[-1].append(index)
        room -= size
    return found


def bucketed(sizes: Sequence[float], most: float, devices: int, link: Link, ready: Sequence[float] = ()) -> float:
    """Seconds until the last of many arrays is summed, in messages of at most `most` bytes, one after the other.

    ready: when each array is there (a backward pass gives them one by one), 0 where not given. A message leaves when
    its last array is there and the message before has arrived.
    """
    done = 0.0
    for group in buckets(sizes, most):
        begins = max([done, *(ready[i] for i in group if i < len(ready))])
        done = begins + best_flat(sum(sizes[i] for i in group), devices, link)[1]
    return done


def best_bucket(sizes: Sequence[float], devices: int, link: Link, ready: Sequence[float] = ()) -> tuple[float, float]:
    """(bytes of a message, seconds) that end first: small ones start early, large ones pay latency seldom."""
    total, least = sum(sizes), max(1.0, min(sizes))
    options = [least * 2**i for i in range(math.ceil(math.log2(total / least)) + 1)]
    timed = {most: bucketed(sizes, most, devices, link, ready) for most in options}
    most = min(timed, key=timed.__getitem__)
    return most, timed[most]


def fit(points: Sequence[tuple[str, float, float]], devices: int) -> Link:
    """The link that explains measured (kind, bytes, seconds) best: least squares of relative errors.

    seconds = rounds * latency + share * bytes / bandwidth is linear in (latency, 1 / bandwidth); dividing each
    equation by its seconds lets small messages count as much as large ones. Latencies below 0 are cut to 0. Raises
    ValueError for fewer than two sizes.
    """
    if len({nbytes for _, nbytes, _ in points}) < 2:
        raise ValueError("a line needs two sizes; measure at least two, of which one is small")
    rows = []
    for kind, nbytes, took in points:
        rounds, share = ROUNDS_AND_SHARES[kind](devices)
        rows.append((rounds / took, share * nbytes / took))
    aa, ab, bb = (sum(x * y for x, y in pairs) for pairs in _products(rows))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    latency = (a * bb - b * ab) / determinant
    inverse = (b * aa - a * ab) / determinant
    if latency < 0 or inverse <= 0:
        latency, inverse = (0.0, b / bb) if latency < 0 else (a / aa, 1e-15)
    return Link(latency, 1 / inverse)


def _products(rows: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], ...]:
    return [(r[0], r[0]) for r in rows], [(r[0], r[1]) for r in rows], [(r[1], r[1]) for r in rows]


def errors(points: Sequence[tuple[str, float, float]], devices: int, link: Link) -> Mapping[float, float]:
    """Bytes -> (predicted - measured) / measured."""
    return {nbytes: seconds(kind, nbytes, devices, link) / took - 1 for kind, nbytes, took in points}
