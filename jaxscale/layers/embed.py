"""Token embedding: a lookup in a table whose rows are split over `tensor` and whose width is stored over `fsdp`.

Legend: B batch rows, S sequence, V vocabulary, D width, G members of a group of `fsdp` devices (each has D / G columns
when it looks tokens up). Read next: `vocabulary_groups.py`, which says what these groups are for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.layers.reduce import names, reduce_scatter
from jaxscale.layers.vocabulary_groups import AXIS, embedding_groups
from jaxscale.precision import Precision

TABLE = ("vocab", "embed")
"""Logical axes of the table."""


def embed(precision: Precision, table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """Rows of the table, in the compute dtype, sharded as the residual stream: (B, S, D).

    Each device looks up, in the rows and columns that it has, the tokens of its group; zeros stand for rows that other
    `tensor` devices have, and the sum over them puts them together. The gradient is summed in `precision.reduce`: a
    frequent token adds up thousands of rows, too many for bfloat16. A table that is whole on every device of `fsdp` is
    cut first, and its gradient put together last.
    """
    return _embed(precision, jax.reshard(table_VD, axes.spec(*TABLE)), tokens_BS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(precision: Precision, table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
    """The same of a table sharded as TABLE."""
    stored, residual, tokens = axes.spec(*TABLE), _residual(), _tokens()
    groups = embedding_groups(table_VD.shape[1], jax.sharding.get_abstract_mesh().shape[AXIS])

    def body(table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
        table_VD = groups.gather_between(table_VD.astype(precision.compute), dim=1)
        index, here = _local_index(groups.all_gather(tokens_BS), table_VD.shape[0])
        found_GBSD = jnp.where(here[..., None], table_VD[index], 0)
        local = [(), *(names(entry) for entry in tokens), ()]
        partial_sums = {axis for axis in _vocabulary_axes() if jax.lax.axis_size(axis) > 1}
        found_GBSD = reduce_scatter(found_GBSD, local, partial_sums, P(None, *residual))
        return _join_columns(groups.all_to_all(found_GBSD))

    return _manual(body, (stored, tokens), residual)(table_VD, jax.reshard(tokens_BS, tokens))


def _forward(
    precision: Precision, table_VD: jax.Array, tokens_BS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _embed(precision, table_VD, tokens_BS), (table_VD, tokens_BS)


def _backward(
    precision: Precision, residuals: tuple[jax.Array, jax.Array], gradient_BSD: jax.Array
) -> tuple[jax.Array, None]:
    table_VD, tokens_BS = residuals
    stored, tokens = axes.spec(*TABLE), _tokens()
    groups = embedding_groups(table_VD.shape[1], jax.sharding.get_abstract_mesh().shape[AXIS])
    gradient_BSD = jax.reshard(gradient_BSD, P(*tokens, None)).astype(precision.reduce)
    summed = {axis for entry in tokens for axis in names(entry)} - {AXIS}

    def body(gradient_BSD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
        rows = table_VD.shape[0] // jax.lax.axis_size(tuple(_vocabulary_axes()))
        index, here = _local_index(groups.all_gather(tokens_BS), rows)
        gradient_GBSD = groups.all_to_all(_split_columns(gradient_BSD, groups.count))
        zeros = jnp.zeros((rows, gradient_GBSD.shape[-1]), gradient_BSD.dtype)
        total_VD = zeros.at[index].add(jnp.where(here[..., None], gradient_GBSD, 0))
        total_VD = groups.scatter_between(total_VD, dim=1)
        partial_sums = {axis for axis in summed if jax.lax.axis_size(axis) > 1}
        return reduce_scatter(total_VD, [names(entry) for entry in stored], partial_sums, stored)

    total = _manual(body, (P(*tokens, None), tokens), stored)(gradient_BSD, jax.reshard(tokens_BS, tokens))
    return total.astype(table_VD.dtype), None


_embed.defvjp(_forward, _backward)


def _manual(body: Callable[..., jax.Array], inputs: tuple[P, ...], output: P) -> Callable[..., jax.Array]:
    # check_vma: sums over groups of an axis are none over the axis, which it could not tell apart.
    return jax.shard_map(body, in_specs=inputs, out_specs=output, axis_names=axes.automatic(), check_vma=False)


def _join_columns(x_GBSD: jax.Array) -> jax.Array:
    """(G, B, S, D / G) -> (B, S, D)."""
    return jnp.moveaxis(x_GBSD, 0, 2).reshape(*x_GBSD.shape[1:3], -1)


def _split_columns(x_BSD: jax.Array, count: int) -> jax.Array:
    """(B, S, D) -> (G, B, S, D / G)."""
    return jnp.moveaxis(x_BSD.reshape(*x_BSD.shape[:2], count, -1), 2, 0)


def _residual() -> P:
    return axes.spec("act_batch", "act_residual_sequence", "act_embed")


def _tokens() -> P:
    return axes.spec("act_batch", "act_sequence")


def _vocabulary_axes() -> set[str]:
    return set(axes.mesh_axes("vocab"))


def _local_index(tokens: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Row of this device's part of the table for each token, and whether the token is in that part."""
    index = tokens - jax.lax.axis_index(tuple(_vocabulary_axes())) * rows
    here = (index >= 0) & (index < rows)
    return jnp.where(here, index, 0), here
