"""Reads the collectives out of compiled HLO, so that tests can say which ones a program has, and over which mesh axes.

Read next: `tests/contracts/test_collectives.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from jaxscale.plan.device_groups import KINDS, axes_of

_CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(-start)?\((?P<rest>.*)$", re.MULTILINE)
_ARRAY = re.compile(r"[a-z0-9]+\[([0-9,]*)\]")

Collective = tuple[str, tuple[str, ...], tuple[int, ...]]
"""Kind, mesh axes it runs over, shape of the result on one device."""


def collectives(hlo: str, sizes: Mapping[str, int]) -> Counter[Collective]:
    """How often each collective stands in the program text (a loop's body stands there once).

    sizes: the mesh axes in device order. Operands that XLA combined into one call count one each. Collectives over one
    device only move nothing and are left out. Raises ValueError for groups of devices that are no set of mesh axes.
    """
    found: Counter[Collective] = Counter()
    for call in _CALL.finditer(hlo):
        axes = axes_of(call["kind"], call["rest"], sizes)
        if axes is None:
            continue
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
