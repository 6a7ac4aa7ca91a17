"""Token embedding: a lookup in a table whose rows are split over `tensor` and whose width is stored over `fsdp`.

Legend: B batch rows, S sequence, V vocabulary, D width. Read next: `layers/attention.py`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.layers.reduce import names, reduce_scatter
from jaxscale.precision import Precision

TABLE = ("vocab", "embed")
"""Logical axes of the table."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def embed(precision: Precision, table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """Rows of the table, in the compute dtype, sharded as the residual stream: (B, S, D).

    Each device looks up the tokens that its rows of the vocabulary cover, zeros stand for the others, and the sum over
    `tensor` puts them together. The gradient is summed in `precision.reduce`: a frequent token adds up thousands of
    rows, too many for bfloat16.
    """
    stored, gathered, residual = axes.spec(*TABLE), axes.gathered_spec(TABLE), _residual()
    tokens = jax.typeof(tokens_BS).sharding.spec
    table_VD = jax.reshard(jax.reshard(table_VD, stored).astype(precision.compute), gathered)

    def body(table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
        index, here = _local_index(tokens_BS, table_VD.shape[0])
        found_BSD = jnp.where(here[..., None], table_VD[index], 0)
        return reduce_scatter(found_BSD, _tokens_axes(tokens), _vocabulary_axes(), residual)

    specs = (gathered, tokens)
    return jax.shard_map(body, in_specs=specs, out_specs=residual, axis_names=axes.automatic())(table_VD, tokens_BS)


def _forward(
    precision: Precision, table_VD: jax.Array, tokens_BS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return embed(precision, table_VD, tokens_BS), (table_VD, tokens_BS)


def _backward(
    precision: Precision, residuals: tuple[jax.Array, jax.Array], gradient_BSD: jax.Array
) -> tuple[jax.Array, None]:
    table_VD, tokens_BS = residuals
    stored, gathered = axes.spec(*TABLE), axes.gathered_spec(TABLE)
    tokens = jax.typeof(tokens_BS).sharding.spec
    gradient_BSD = jax.reshard(gradient_BSD, P(*tokens, None)).astype(precision.reduce)
    summed = {axis for entry in tokens for axis in names(entry)}

    def body(gradient_BSD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
        rows = table_VD.shape[0] // jax.lax.axis_size(tuple(_vocabulary_axes()))
        index, here = _local_index(tokens_BS, rows)
        zeros = jnp.zeros((rows, table_VD.shape[1]), gradient_BSD.dtype)
        total_VD = zeros.at[index].add(jnp.where(here[..., None], gradient_BSD, 0))
        return reduce_scatter(total_VD, [names(entry) for entry in gathered], summed, stored)

    specs = (P(*tokens, None), tokens)
    mapped = jax.shard_map(body, in_specs=specs, out_specs=stored, axis_names=axes.automatic())
    total = mapped(gradient_BSD, tokens_BS)
    return total.astype(table_VD.dtype), None


embed.defvjp(_forward, _backward)


def _residual() -> P:
    return axes.spec("act_batch", "act_residual_sequence", "act_embed")


def _vocabulary_axes() -> set[str]:
    return set(axes.mesh_axes("vocab"))


def _tokens_axes(tokens: P) -> list[tuple[str, ...]]:
    return [*(names(entry) for entry in tokens), ()]


def _local_index(tokens_BS: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Row of this device's part of the table for each token, and whether the token is in that part."""
    index = tokens_BS - jax.lax.axis_index(tuple(_vocabulary_axes())) * rows
    here = (index >= 0) & (index < rows)
    return jnp.where(here, index, 0), here
