"""Which weights DiLoCo exchanges together, and after which steps. Pure. Read next: `local_sgd.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from jaxscale.task import Parameter


def fragments(parameters: Mapping[str, Parameter], count: int) -> list[list[str]]:
    """Paths in `count` groups of about the same size: the largest weight goes to the group that has least so far.

    Whole weights, with all their layers: no shard is cut, whatever it is sharded over. Raises ValueError for more
    groups than weights.
    """
    if count > len(parameters):
        raise ValueError(f"{len(parameters)} weights cannot be {count} groups")
    sizes = {path: math.prod(p.shape) for path, p in parameters.items()}
    groups: list[list[str]] = [[] for _ in range(count)]
    held = [0] * count
    for path in sorted(sizes, key=lambda path: (-sizes[path], path)):
        least = min(range(count), key=lambda g: (held[g], g))
        groups[least].append(path)
        held[least] += sizes[path]
    return groups


def is_due[Step: (int, jax.Array)](done: Step, every: int, number: int, count: int, delay: int = 0) -> Step | bool:
    """Whether group `number` of `count` is exchanged after `done` steps, or put in, `delay` steps after that.

    The last group after each `every` steps, the others evenly between: with one group at `every`, 2 `every`, ...
    """
    first = every * (number + 1) // count
    since = done - delay - first
    return (since >= 0) & (since % every == 0)
