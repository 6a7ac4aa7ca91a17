"""Counts the matmul FLOPs of a traced function, loops included, so that formulas can be tested against programs."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_flops(program: ClosedJaxpr) -> float:
    """2 m n k for every matrix product, times the trips of the scans it is in.

    Inside a `shard_map` shapes are those of one device: trace on a mesh of one device to count the whole.
    """
    return _count(program.jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval  # every operand of a product is an array
            result: Any = equation.outvars[0].aval
            total += 2 * math.prod(result.shape) * math.prod(left.shape[d] for d in contracted)
        inner = sum(_count(body) for body in _bodies(equation.params))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def _bodies(parameters: dict[str, Any]) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(parameters.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr))
    return [
        leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf
        for leaf in leaves
        if isinstance(leaf, ClosedJaxpr | Jaxpr)
    ]
