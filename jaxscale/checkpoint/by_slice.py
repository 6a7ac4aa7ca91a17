"""Arrays of which each slice has its own part, read where there are more or fewer slices than wrote them.

Their leading dim counts slices, so another number of them is another shape. They are read whole, then dealt out anew:

    across/residual   slice s of n goes to slice s mod m, where it is added: no gradient is lost; who joins has none
    local/params      the first m stay; who joins starts from the common weights, `params`
    local/opt         the first m stay; who joins gets the mean of the others (zeros would make Adam leap)

Read next: `restore.py` and `assemble.py`, which call this; `../parallel/gradient_exchange.py`, which keeps such arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import tree

RESIDUAL, WEIGHTS, SLOTS = "across/residual/", "local/params/", "local/opt/"
Arrays = Mapping[str, tuple[tuple[int, ...], str]]


def as_stored(abstract: Mapping[str, Any], saved: Arrays) -> dict[str, Any]:
    """`abstract` (nested dict of `jax.ShapeDtypeStruct`) with as many slices as the checkpoint's arrays have. Pure.

    Whoever reads gets all of them: how they are dealt out is decided by `dealt`.
    """
    return tree.map_paths(lambda path, leaf: _with_slices_of(saved.get(path), leaf, path), abstract)


def _with_slices_of(saved: tuple[tuple[int, ...], str] | None, leaf: Any, path: str) -> Any:
    if not path.startswith((RESIDUAL, WEIGHTS, SLOTS)) or saved is None:
        return leaf
    shape = saved[0]
    if shape == leaf.shape or shape[1:] != leaf.shape[1:]:
        return leaf
    sharding = leaf.sharding
    everyone = NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=everyone)


def dealt(state: dict[str, Any], abstract: Mapping[str, Any]) -> dict[str, Any]:
    """A state read as `as_stored` says, as `abstract` wants it; all processes of a world call this."""
    wanted, leaves = tree.flatten(abstract), tree.flatten(state)
    others = {path: leaf for path, leaf in leaves.items() if leaf.shape != wanted[path].shape}
    if not others:
        return state
    common = {path: leaves["params/" + path.removeprefix(WEIGHTS)] for path in others if path.startswith(WEIGHTS)}
    with jax.set_mesh(next(iter(others.values())).sharding.mesh):
        specs = {path: wanted[path].sharding.spec for path in others}
        counts = {path: wanted[path].shape[0] for path in others}

        def deal(others: dict[str, jax.Array], common: dict[str, jax.Array]) -> dict[str, jax.Array]:
            found = {path: _deal(path, x, counts[path], common.get(path)) for path, x in others.items()}
            return {path: jax.reshard(x, specs[path]) for path, x in found.items()}

        return tree.unflatten({**leaves, **jax.jit(deal)(others, common)})


def _deal(path: str, x: jax.Array, count: int, common: jax.Array | None) -> jax.Array:
    before = x.shape[0]
    if path.startswith(RESIDUAL):
        rows = [
            sum((x[s] for s in range(one + count, before, count)), start=x[one]) for one in range(min(before, count))
        ]
        joined = jnp.zeros_like(x[0])
    else:
        rows = [x[s] for s in range(min(before, count))]
        joined = jnp.mean(x, axis=0) if common is None else common.astype(x.dtype)
    return jnp.stack([*rows, *[joined] * (count - len(rows))])
