"""Programs that see one slice at a time: manual over the mesh axis `data`, and inside a slice as they are elsewhere.

Gradients normally come out of each weight's own rule already summed over `data`. Inside such a region that axis is not
there (`axes.spec` leaves it out), so they stay one slice's share, and whoever asked says how they cross the slow links.
Read next: `gradient_exchange.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxscale import axes

DATA = "data"
EVERYWHERE, OWN = P(), P(DATA)
"""Specs of what all slices have alike, and of what is a slice's own: there the leading dim counts slices."""


def slices() -> int:
    """Of the current mesh, each with a copy of the weights."""
    return int(jax.sharding.get_abstract_mesh().shape.get(DATA, 1))


def on_each_slice(body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`body` as a function of global arrays, run once a slice on that slice's part of them.

    in_specs, out_specs: `EVERYWHERE` or `OWN` for each argument and result (or trees of them); a batch is `OWN`.
    Sharding over the other axes stays part of the types. Nothing checks that what comes out as `EVERYWHERE` is equal
    on all slices: the body has to make it so.
    """
    # Without the check a weight's gradient stays what one slice computed; with it JAX would sum it over the slices.
    return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names={DATA}, check_vma=False)


def total[Tree](values: Tree) -> Tree:
    """Sums over all slices inside `on_each_slice`; elsewhere the values are of all slices already."""
    # Of a single slice they are the sum; XLA's partitioner refuses some collectives over one device.
    return jax.lax.psum(values, DATA) if DATA in axes.manual() and slices() > 1 else values


def own(tree: Any) -> Any:
    """A slice's own part of what was given as `OWN`: without the leading dim."""
    return jax.tree.map(lambda x: x[0], tree)


def as_own(tree: Any) -> Any:
    """The way back: with a leading dim, to be returned as `OWN`."""
    return jax.tree.map(lambda x: x[None], tree)
