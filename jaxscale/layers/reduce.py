"""Products whose contracted dims are split over devices: multiply locally, then reduce with little traffic.

XLA would derive the same from shardings, but on backends without a reduce-scatter pass as an all-reduce of the whole
result that is then cut. Here the collectives are written out, so every backend runs the same ones, and across slices
the order is right: reduce-scatter over the fast axes first, then the shards over the slow ones. Read next: `linear.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxscale import axes
from jaxscale.ops.quantised import Multiply, exact

Product = tuple[str, jax.Array, jax.Array]
"""einsum equation, left, right"""


def contract(products: Sequence[Product], out: P, dtype: DTypeLike, multiply: Multiply = exact) -> jax.Array:
    """The sum of the products, with spec `out`.

    All products have the same result dims. Mesh axes over which contracted dims are split are reduced once, after the
    local sum. The local products accumulate in float32 and are rounded to `dtype`, in which devices are summed.
    multiply: how one device multiplies.
    """
    operands = [operand for _, left, right in products for operand in (left, right)]
    specs = tuple(jax.typeof(operand).sharding.spec for operand in operands)
    equations = [equation for equation, _, _ in products]
    local, contracted = result_axes(equations[0], specs[0], specs[1])

    def body(*shards: jax.Array) -> jax.Array:
        pairs = zip(equations, shards[::2], shards[1::2], strict=True)
        total = sum(multiply(e, left, right, dtype) for e, left, right in pairs)
        return reduce_scatter(jnp.asarray(total), local, contracted, out)

    return jax.shard_map(body, in_specs=specs, out_specs=out, axis_names=axes.automatic())(*operands)


def result_axes(equation: str, left: P, right: P) -> tuple[list[tuple[str, ...]], set[str]]:
    """(mesh axes of each result dim before any reduction, mesh axes whose devices hold partial sums). Pure."""
    operands, result = equation.split("->")
    by_letter: dict[str, tuple[str, ...]] = {}
    for dims, spec in zip(operands.split(","), (left, right), strict=True):
        for letter, entry in zip(dims, spec, strict=True):
            by_letter[letter] = by_letter.get(letter) or names(entry)
    contracted = {axis for letter, split in by_letter.items() if letter not in result for axis in split}
    return [by_letter[letter] for letter in result], contracted


def reduce_scatter(value: jax.Array, local: Sequence[tuple[str, ...]], partial: set[str], out: P) -> jax.Array:
    """Inside a manual region: partial sums over the axes `partial` -> this device's shard of the sum with spec `out`.

    local: mesh axes of each dim of `value` now. An axis that `out` splits a dim over is scattered along it, innermost
    axes last so that shards come out in mesh order; the others are summed afterwards, when only shards are left.
    """
    left = set(partial)
    for dim, entry in enumerate((*out, *[None] * (value.ndim - len(out)))):
        for axis in names(entry):
            if axis not in left or axis in local[dim]:
                continue
            left.remove(axis)
            if jax.lax.axis_size(axis) > 1:
                value = jax.lax.psum_scatter(value, axis, scatter_dimension=dim, tiled=True)
    return jax.lax.psum(value, tuple(sorted(left))) if left else value


def names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
