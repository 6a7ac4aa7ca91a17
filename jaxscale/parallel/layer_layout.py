"""Where the layers of a pipelined model lie: each stage's chunks together in the program, in the model's order on disk.

Stage s has the chunks s, S + s, 2 S + s, ... so with several chunks a stage its layers are not neighbours; chunks with
fewer layers than the longest are filled up with zeros. A program's stacked layers are sorted by stage and padded;
checkpoints are neither, so that any layout reads what any other one wrote. Where stages do not divide the model's
layers, a checkpoint's arrays are split over stages by another dim. Read next: `../checkpoint/stored_layout.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale import host_memory
from jaxscale.checkpoint.stored_layout import State, StoredLayout
from jaxscale.parallel.division import Division
from jaxscale.tree import flatten, unflatten

STAGE = "stage"


@lru_cache
def layer_layout(division: Division) -> StoredLayout | None:
    """None where the program has the layers in the model's order, and no others."""
    places, layers = division.order, range(division.layers)
    if places == tuple(layers):
        return None
    back = tuple(places.index(layer) for layer in layers)

    def changed(count: int, move: Callable[[jax.Array], jax.Array]) -> Callable[[State], dict[str, Any]]:
        def change(state: State) -> dict[str, Any]:
            found = flatten(dict(state))
            return unflatten({path: in_place(x) if _is_stacked(path, x, count) else x for path, x in found.items()})

        def in_place(value: jax.Array) -> jax.Array:
            """What is kept in host memory comes to the devices, which alone can gather, and goes back."""
            return (
                host_memory.to_host(move(host_memory.to_device(value)))
                if host_memory.is_on_host(value)
                else move(value)
            )

        return change

    return StoredLayout(
        store=changed(division.places, lambda x: _stored(x, back)),
        restore=changed(division.layers, lambda x: _restored(x, places)),
    )


def stored_spec(shape: Sequence[int], spec: P, sizes: Mapping[str, int]) -> P:
    """How the stacked layers of a checkpoint are split: as a program's, over stages by the first dim if they divide it,
    else by the largest other dim that they divide beside what splits it already, else not at all.

    shape: with the model's number of layers; spec: of the program's array; sizes: of the mesh axes.
    """
    stages = sizes.get(STAGE, 1)
    entries = [_axes(entry) for entry in spec]
    if stages == 1 or not entries or STAGE not in entries[0] or shape[0] % stages == 0:
        return spec
    entries[0] = tuple(axis for axis in entries[0] if axis != STAGE)
    parts = [math.prod(sizes[axis] for axis in axes) for axes in entries]
    able = [d for d in range(1, len(entries)) if shape[d] % (parts[d] * stages) == 0]
    if able:
        dim = max(able, key=lambda d: shape[d] // parts[d])
        entries[dim] = (*entries[dim], STAGE)
    return P(*map(_entry, entries))


def _stored(value: jax.Array, places: tuple[int, ...]) -> jax.Array:
    """The layers at these places of a program's array, in this order."""
    sharding = jax.typeof(value).sharding
    spec = stored_spec((len(places), *value.shape[1:]), sharding.spec, sharding.mesh.shape)
    if spec != sharding.spec:  # first moved, then taken: each device has all layers of its part
        value = jax.reshard(value, spec)
    return value.at[jnp.array(places)].get(out_sharding=spec)


def _restored(value: jax.Array, layers: tuple[int | None, ...]) -> jax.Array:
    """A program's array of these layers of a checkpoint's, with zeros where there is none."""
    sharding = jax.typeof(value).sharding
    wanted = jnp.array([value.shape[0] if layer is None else layer for layer in layers])  # outside: filled
    found = value.at[wanted].get(mode="fill", fill_value=0, out_sharding=sharding.spec)
    by_stage = [tuple(axis for axis in _axes(entry) if axis != STAGE) for entry in sharding.spec]
    if sharding.mesh.shape.get(STAGE, 1) > 1:
        by_stage[0] = (STAGE, *by_stage[0])
    spec = P(*map(_entry, by_stage))
    return found if spec == sharding.spec else jax.reshard(found, spec)


def _is_stacked(path: str, value: jax.Array, count: int) -> bool:
    """Whether it is a leaf of the stacked layers: of the parameters, or of what is kept beside each of them."""
    return "layers" in path.split("/") and value.ndim > 0 and value.shape[0] == count


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: tuple[str, ...]) -> Any:
    return None if not axes else axes[0] if len(axes) == 1 else axes
