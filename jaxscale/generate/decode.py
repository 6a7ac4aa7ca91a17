"""The forward pass of generation: a prompt at once (`prefill`), then a token at a time (`decode`).

Both run the model's own layers, with an attention that keeps its keys and values in a cache. They are one function on
S positions: the residual stream is split over `context` and `tensor`, so even a single token travels as one position
for each of these shards; what the filling positions leave in the cache lies behind the row's length, never read.
Read next: `sample.py`.

Legend: B batch rows, S new positions, W longest prompt, D width, V vocabulary; L, T, G, K as in `cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from jaxscale import axes
from jaxscale.generate.cache import Cache, LayerCache, make_cache
from jaxscale.layers.attention import Attend, RopeTables
from jaxscale.layers.embed import TABLE, embed
from jaxscale.layers.norm import rms_norm
from jaxscale.layers.rope import rope_tables
from jaxscale.precision import Precision
from jaxscale.task import LayerSums, Params

if TYPE_CHECKING:
    from jaxscale.models.transformer_config import TransformerConfig

CHUNK = 512
"""Positions of a prompt that are computed at once: bounds the scores, (B, H, CHUNK, T) in float32."""


class Decoder(Protocol):
    """A task that generates. Hashable: programs are compiled once for each."""

    @property
    def model(self) -> TransformerConfig: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def vocabulary(self) -> int: ...

    def head(self, params: Params) -> jax.Array: ...

    def layer(
        self,
        x_BSD: jax.Array,
        weights: Any,
        tables: RopeTables,
        row_B: jax.Array,
        dropout_key: jax.Array | None,
        attend: Attend,
    ) -> tuple[jax.Array, LayerSums]: ...

    def scan_layers[Carry](
        self, stacked: Params, step: Callable[[Carry, Params, jax.Array, int], Carry], carry: Carry
    ) -> Carry: ...


@partial(jax.jit, static_argnames=("task", "capacity"))
def prefill(
    task: Decoder, params: Params, tokens_BW: jax.Array, length_B: jax.Array, *, capacity: int
) -> tuple[Cache, jax.Array]:
    """Reads prompts. Returns the cache, and the logits (B, V) of the token after each prompt.

    tokens_BW: int32, each prompt from the left, any ids behind its length; length_B: int32, 1 to W. B is a multiple of
    the batch shards. capacity: positions that a row can hold, W and more. Logits are float32, sharded over rows alone.
    """
    model = task.model
    B, W = tokens_BW.shape
    chunk = _round_up(min(W, CHUNK), sequence_shards())
    chunks = -(-W // chunk)
    tokens_BW = jnp.pad(jax.reshard(tokens_BW, axes.spec("act_batch", None)), ((0, 0), (0, chunks * chunk - W)))
    length_B = jax.reshard(length_B, axes.spec("act_batch"))
    cache = make_cache(model.layers, B, capacity, model.key_heads, model.dim_per_head, task.precision.compute)

    def read(
        carry: tuple[Cache, jax.Array], chunk_and_start: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[Cache, jax.Array], None]:
        (cache, last_BD), (tokens_BS, start) = carry, chunk_and_start
        start_B = jnp.broadcast_to(start, (B,), out_sharding=axes.spec("act_batch"))
        cache, x_BSD = _extend(task, params, cache, tokens_BS, start_B)
        return (cache, last_BD + _position(x_BSD, length_B - 1 - start)), None

    last_BD = jnp.zeros((B, model.width), task.precision.compute, out_sharding=axes.spec("act_batch", None))
    if chunks == 1:
        (cache, last_BD), _ = read((cache, last_BD), (tokens_BW, jnp.int32(0)))
    else:
        tokens_NBS = tokens_BW.reshape(B, chunks, chunk).swapaxes(0, 1)
        (cache, last_BD), _ = jax.lax.scan(read, (cache, last_BD), (tokens_NBS, jnp.arange(chunks) * chunk))
    return Cache(cache.keys_LBGTK, cache.values_LBGTK, length_B), _logits(task, params, last_BD)


@partial(jax.jit, static_argnames="task", donate_argnames="cache")
def decode(task: Decoder, params: Params, cache: Cache, token_B: jax.Array) -> tuple[Cache, jax.Array]:
    """Appends one token (int32) to each row. Returns the cache, and the logits (B, V) of the token after it.

    The cache is donated: it is written in place. Its rows must have room for one more position. Logits as in `prefill`.
    """
    token_B1 = jax.reshard(token_B, axes.spec("act_batch"))[:, None]
    tokens_BS = jnp.pad(token_B1, ((0, 0), (0, sequence_shards() - 1)))
    cache, x_BSD = _extend(task, params, cache, tokens_BS, cache.length_B)
    longer = Cache(cache.keys_LBGTK, cache.values_LBGTK, cache.length_B + 1)
    return longer, _logits(task, params, _position(x_BSD, jnp.zeros_like(cache.length_B)))


def sequence_shards() -> int:
    """Over how many devices of the current mesh the positions of the residual stream are split."""
    sizes = jax.sharding.get_abstract_mesh().shape
    count = 1
    for axis in axes.mesh_axes("act_residual_sequence"):
        count *= sizes[axis]
    return count


def _extend(
    task: Decoder, params: Params, cache: Cache, tokens_BS: jax.Array, start_B: jax.Array
) -> tuple[Cache, jax.Array]:
    """The residual stream after the last norm, (B, S, D), of S tokens from position `start_B` on; fills the cache.

    S is a multiple of the sequence's shards. `length_B` of the cache is left to the caller, who knows which are real.
    """
    model = task.model
    tokens_BS = jax.reshard(tokens_BS, axes.spec("act_batch", "act_sequence"))
    position_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1])
    tables = rope_tables(position_BS, model.dim_per_head, model.rope)

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array], weights: Params, layer: jax.Array, window: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x_BSD, keys, values = carry
        attend = LayerCache(keys, values, layer, start_B, window=window, softcap=model.attention_softcap)
        x_BSD, _ = task.layer(x_BSD, weights, tables, start_B, None, attend)
        return x_BSD, attend.keys_LBGTK, attend.values_LBGTK

    x_BSD = embed(task.precision, params["embed"]["table"], tokens_BS)
    x_BSD, keys, values = task.scan_layers(params["layers"], step, (x_BSD, cache.keys_LBGTK, cache.values_LBGTK))
    return Cache(keys, values, cache.length_B), rms_norm(x_BSD, params["norm"]["scale"], model.norm_epsilon)


def _position(x_BSD: jax.Array, index_B: jax.Array) -> jax.Array:
    """(B, D): each row's activations at a position of its own; zeros where S positions do not have it."""
    is_wanted_BS = jnp.arange(x_BSD.shape[1]) == index_B[:, None]
    is_wanted_BS = jax.reshard(is_wanted_BS, axes.spec("act_batch", "act_residual_sequence"))
    return jnp.sum(jnp.where(is_wanted_BS[:, :, None], x_BSD, 0), axis=1)


def _logits(task: Decoder, params: Params, x_BD: jax.Array) -> jax.Array:
    names, equation = (TABLE, "BD,VD->BV") if task.model.tied else (TABLE[::-1], "BD,DV->BV")
    head = jax.reshard(task.head(params).astype(task.precision.compute), axes.gathered_spec(names))
    logits_BV = jnp.einsum(
        equation, x_BD, head, preferred_element_type=jnp.float32, out_sharding=axes.spec("act_batch", "act_vocab")
    )
    if cap := task.model.logit_softcap:
        logits_BV = cap * jnp.tanh(logits_BV / cap)
    return jax.reshard(logits_BV, axes.spec("act_batch", None))  # a draw needs the whole vocabulary of its row


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
