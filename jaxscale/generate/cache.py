"""Keys and values of the tokens so far, sharded like the attention that reads them, and that attention.

Rows lie over the batch axes and heads over `tensor`, so a device reads and writes only its own part of the cache and
nothing is communicated. Windowed layers hold whole rows too; the window is a mask. Read next: `decode.py`.

Legend: L layers, B batch rows, S new positions, T capacity (positions a row can hold), H query heads, G key/value
heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.ops import attention_xla

CACHE = (None, "act_batch", "act_kv_heads", "act_attended_sequence", None)
"""Logical axes of the cached keys and values. Heads before positions, as the products want them: with positions first
each step would transpose all that is cached, several times the time of reading it (measured on CPU)."""


@partial(jax.tree_util.register_dataclass, data_fields=("keys_LBGTK", "values_LBGTK", "length_B"), meta_fields=())
@dataclass(frozen=True)
class Cache:
    """What is known of each row. A row's positions from its length on hold nothing that is ever read."""

    keys_LBGTK: jax.Array
    values_LBGTK: jax.Array
    """Both in the compute dtype, sharded as CACHE; keys are normalised and rotated already."""
    length_B: jax.Array
    """int32, tokens of each row, sharded over the batch axes."""


def make_cache(
    layers: int, rows: int, capacity: int, kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """An empty cache on the current mesh. Traceable. `rows` is a multiple of the batch shards."""
    shape = (layers, rows, kv_heads, capacity, head_dim)
    keys, values = (jnp.zeros(shape, dtype, out_sharding=axes.spec(*CACHE)) for _ in range(2))
    return Cache(keys, values, jnp.zeros((rows,), jnp.int32, out_sharding=axes.spec("act_batch")))


class LayerCache:
    """The attention of one layer, to be passed as its `attend`; called once, while tracing.

    It writes the keys and values of the new positions into the cache at `start_B` and attends to everything up to each
    query's own position. A layer only takes a function (q, k, v) -> out, so the cache with the new positions is left
    in `keys_LBGTK` and `values_LBGTK`, where the caller picks it up.
    """

    def __init__(
        self,
        keys_LBGTK: jax.Array,
        values_LBGTK: jax.Array,
        layer: jax.Array,
        start_B: jax.Array,
        *,
        window: int,
        softcap: float,
    ) -> None:
        self.keys_LBGTK, self.values_LBGTK = keys_LBGTK, values_LBGTK
        self._layer, self._start_B = layer, start_B
        self._local = partial(_write_and_attend, window=window, softcap=softcap)

    def __call__(self, q_BSHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array) -> jax.Array:
        """q, k, v: (B, S, heads, K) of any sharding; returns (B, S, H, K), sharded over rows and heads."""
        cache, rows = axes.spec(*CACHE), axes.spec("act_batch")
        q_spec = axes.spec("act_batch", "act_attended_sequence", "act_heads", None)
        k_spec = axes.spec("act_batch", "act_attended_sequence", "act_kv_heads", None)
        mapped: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = jax.shard_map(
            self._local,
            in_specs=(cache, cache, P(), rows, q_spec, k_spec, k_spec),
            out_specs=(q_spec, cache, cache),
        )
        new = (jax.reshard(x, spec) for x, spec in ((q_BSHK, q_spec), (k_BSGK, k_spec), (v_BSGK, k_spec)))
        out_BSHK, self.keys_LBGTK, self.values_LBGTK = mapped(
            self.keys_LBGTK, self.values_LBGTK, self._layer, self._start_B, *new
        )
        return out_BSHK


def _write_and_attend(
    keys_LBGTK: jax.Array,
    values_LBGTK: jax.Array,
    layer: jax.Array,
    start_B: jax.Array,
    q_BSHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    window: int,
    softcap: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One device's rows and heads."""
    B, S = k_BSGK.shape[:2]
    G, T = keys_LBGTK.shape[2:4]
    position_BS = start_B[:, None] + jnp.arange(S)

    def write(cache_LBGTK: jax.Array, new_BSGK: jax.Array) -> jax.Array:
        # In place: only the new positions move. Those past the capacity are padding of a call, and dropped.
        place = cache_LBGTK.at[layer, jnp.arange(B)[:, None, None], jnp.arange(G)[:, None], position_BS[:, None]]
        return place.set(new_BSGK.swapaxes(1, 2), mode="drop", unique_indices=True)

    keys_LBGTK, values_LBGTK = write(keys_LBGTK, k_BSGK), write(values_LBGTK, v_BSGK)
    query_BS1, key_T = position_BS[:, :, None], jnp.arange(T)
    mask_BST = key_T <= query_BS1
    if window:
        mask_BST &= key_T > query_BS1 - window
    keys_BTGK, values_BTGK = (
        jax.lax.dynamic_index_in_dim(cache, layer, 0, keepdims=False).swapaxes(1, 2)
        for cache in (keys_LBGTK, values_LBGTK)
    )
    out_BSHK = attention_xla.attend(q_BSHK, keys_BTGK, values_BTGK, mask_BST, softcap=softcap)
    return out_BSHK, keys_LBGTK, values_LBGTK
