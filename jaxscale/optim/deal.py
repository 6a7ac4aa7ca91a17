"""Where the matrices of a stacked, sharded parameter are worked on: a pure choice per tensor, and the moves for it.

A matrix algorithm such as Newton-Schulz (`muon.py`) needs whole rows and columns, but FSDP and tensor parallelism have
cut each matrix up. Instead of gathering every matrix everywhere, each mesh axis is given one job:
- *deal*: its devices take different matrices of the stack, whole (one all-to-all there, one back);
- *long*: its devices keep parts of the long side; each iteration all-reduces the small matrix of the short side;
- *idle*: its devices hold the same and do the same.
All moves are all-to-alls, so that no device ever holds more than its share. Read next: `muon.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

Side = Literal["stack", "short", "long"]

FLOPS_PER_ELEMENT = {"data": 20_000.0, "stage": 20_000.0}
"""Float32 matmul FLOPs in the time that one float32 crosses a link of this axis; see DEFAULT_FLOPS_PER_ELEMENT."""

DEFAULT_FLOPS_PER_ELEMENT = 2_000.0
"""For axes inside a slice: about 50 TFLOP/s of float32 matmul over 25e9 elements/s of ICI. Outer axes are ten times
slower. Only the choice of a layout depends on these figures, never a result, so they are round."""

ITERATIONS = 5
"""Newton-Schulz iterations that one move pays for."""


@dataclass(frozen=True)
class Layout:
    """A job for every mesh axis larger than 1: `deal` and `long` in the order of the moves; the others are idle.

    `placed`: the side of the matrix that each axis shards in storage; absent where it shards none.
    """

    deal: tuple[str, ...]
    long: tuple[str, ...]
    placed: Mapping[str, Side]
    sizes: Mapping[str, int]

    @property
    def dealt_over(self) -> int:
        return math.prod(self.sizes[axis] for axis in self.deal)


def choose_layout(stack: int, short: int, long: int, placed: Mapping[str, Side], sizes: Mapping[str, int]) -> Layout:
    """The cheapest layout for `stack` matrices of (short, long), all global sizes, by FLOPs and elements moved.

    A stack that the dealing axes do not divide is padded with zero matrices. An axis that already shards the stack
    stays there. `sizes`: of the mesh axes. Always succeeds: dealing is possible whatever the sizes.
    """
    live = [axis for axis, size in sizes.items() if size > 1]
    own_stack = stack // math.prod(sizes[axis] for axis in live if placed.get(axis) == "stack")
    free = [axis for axis in live if placed.get(axis) != "stack"]
    best: tuple[float, Layout] | None = None
    for jobs in itertools.product(("deal", "long", "idle"), repeat=len(free)):
        layout = Layout(
            tuple(axis for axis, job in zip(free, jobs, strict=True) if job == "deal"),
            tuple(axis for axis, job in zip(free, jobs, strict=True) if job == "long"),
            placed,
            sizes,
        )
        if any(job == "idle" and axis in placed for axis, job in zip(free, jobs, strict=True)):
            continue  # the axis cuts the matrix in storage: leaving it idle would mean to gather
        if long % math.prod(sizes[axis] for axis in layout.long):
            continue
        cost = _cost(layout, own_stack, short, long)
        if best is None or cost < best[0]:
            best = cost, layout
    assert best is not None, "dealing over every axis is always allowed"
    return best[1]


def to_layout(x_NRC: jax.Array, layout: Layout) -> jax.Array:
    """Inside a fully manual `jax.shard_map`: this device's block as stored -> its part of its own matrices.

    Dims: N matrices, R the short side, C the long side. Rows and columns may come out in another order, the same for
    every device; `from_layout` undoes it. Returns (ceil(N / dealt), R, C / long).
    """
    if layout.deal:
        x_NRC = jnp.pad(x_NRC, ((0, -x_NRC.shape[0] % layout.dealt_over), (0, 0), (0, 0)))
        # XLA's CPU compiler sends the padding as an operand of its own, of another layout than the rest, and then
        # refuses its own program; behind the barrier there is one array.
        x_NRC = jax.lax.optimization_barrier(x_NRC)
    for axis, target in _moves(layout):
        side = layout.placed.get(axis)
        if side is None:
            part = x_NRC.shape[target] // layout.sizes[axis]
            x_NRC = jax.lax.dynamic_slice_in_dim(x_NRC, jax.lax.axis_index(axis) * part, part, target)
        else:
            x_NRC = jax.lax.all_to_all(x_NRC, axis, split_axis=target, concat_axis=_dim(side), tiled=True)
    return x_NRC


def from_layout(x_NRC: jax.Array, layout: Layout, stack: int) -> jax.Array:
    """The way back: exactly undoes `to_layout`, drops the padding down to `stack` matrices on this device."""
    for axis, target in reversed(_moves(layout)):
        side = layout.placed.get(axis)
        if side is None:
            x_NRC = jax.lax.all_gather(x_NRC, axis, axis=target, tiled=True, to="invarying")
        else:
            x_NRC = jax.lax.all_to_all(x_NRC, axis, split_axis=_dim(side), concat_axis=target, tiled=True)
    return x_NRC[:stack]


def _moves(layout: Layout) -> list[tuple[str, int]]:
    """(axis, dim it is moved to), in order; an axis that already shards the long side has nothing to do for `long`."""
    dealt = [(axis, 0) for axis in layout.deal]
    return dealt + [(axis, 2) for axis in layout.long if layout.placed.get(axis) != "long"]


def _dim(side: Side) -> int:
    return {"stack": 0, "short": 1, "long": 2}[side]


def _cost(layout: Layout, stack: int, short: int, long: int) -> float:
    """FLOPs of one device, with what it sends and receives counted as the FLOPs it could have done meanwhile."""

    def links(axis: str) -> float:
        return FLOPS_PER_ELEMENT.get(axis, DEFAULT_FLOPS_PER_ELEMENT)

    matrices = -(-stack // layout.dealt_over)
    parts = math.prod(layout.sizes[axis] for axis in layout.long)
    gram, polynomial = 4 * short**2 * long / parts, 2 * short**3
    cost = ITERATIONS * matrices * (gram + polynomial)
    cost += sum(ITERATIONS * matrices * 2 * short**2 * links(axis) for axis in layout.long)
    # During the moves of an axis that shards the storage the block of a device keeps its size. An axis that shards
    # nothing slices for free on the way there and gathers what it gave up on the way back.
    cuts = math.prod(layout.sizes[axis] for axis, side in layout.placed.items() if side != "stack")
    block = matrices * layout.dealt_over * short * long / cuts
    for axis, _ in _moves(layout):
        share = 1 - 1 / layout.sizes[axis]
        cost += block * share * links(axis) * (2 if axis in layout.placed else 1)
    return cost
