"""Where the layers of a pipelined model lie: each stage's chunks together in the program, in the model's order on disk.

Stage s has the chunks s, S + s, 2 S + s, ... so with several chunks a stage its layers are not neighbours. A program's
stacked layers are sorted by stage; checkpoints are not, so that any layout reads what any other one wrote. Read next:
`../checkpoint/stored_layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.checkpoint.stored_layout import State, StoredLayout
from jaxscale.tree import flatten, unflatten


def order(layers: int, stages: int, chunks: int) -> tuple[int, ...]:
    """Place in the program -> layer of the model. Pure."""
    size = layers // (stages * chunks)
    return tuple((c * stages + s) * size + i for s in range(stages) for c in range(chunks) for i in range(size))


@lru_cache
def layer_layout(layers: int, stages: int, chunks: int) -> StoredLayout | None:
    """None where the program has the layers in the model's order."""
    places = order(layers, stages, chunks)
    if places == tuple(range(layers)):
        return None
    back = tuple(int(i) for i in np.argsort(places))

    def moved(to: tuple[int, ...]) -> Callable[[State], dict[str, Any]]:
        def move(state: State) -> dict[str, Any]:
            found = flatten(dict(state))
            return unflatten({path: _take(x, to) if _is_stacked(path, x, layers) else x for path, x in found.items()})

        return move

    return StoredLayout(store=moved(back), restore=moved(places))


def _is_stacked(path: str, value: jax.Array, layers: int) -> bool:
    """Whether it is a leaf of the stacked layers: of the parameters, or of what is kept beside each of them."""
    return "layers" in path.split("/") and value.ndim > 0 and value.shape[0] == layers


def _take(value: jax.Array, places: tuple[int, ...]) -> jax.Array:
    """The layers at these places, in this order."""
    spec = jax.typeof(value).sharding.spec
    return value.at[jnp.array(places)].get(out_sharding=spec)
