"""The microbatches of a batch: slices that are trained one after the other, and summed. Read next: `pipeline.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxscale import axes
from jaxscale.task import Batch


def split(batch: Batch, microbatches: int) -> dict[str, jax.Array]:
    """Arrays (rows, ...) -> (microbatches, rows / microbatches, ...), without moving a row to another device.

    Row r goes to part r mod M: the rows are reshaped to (rows / M, M) and swapped. The other order, (M, rows / M),
    would move the batch axes onto the dim that a scan runs over.
    """
    return {name: _split(value, microbatches) for name, value in batch.items()}


def join(parts: Batch) -> dict[str, jax.Array]:
    """The way back from `split`: (microbatches, rows / microbatches, ...) -> (rows, ...)."""
    return {name: _join(value) for name, value in parts.items()}


def _join(value: jax.Array) -> jax.Array:
    spec = jax.typeof(value).sharding.spec
    shape = (value.shape[0] * value.shape[1], *value.shape[2:])
    return jax.lax.reshape(jnp.swapaxes(value, 0, 1), shape, out_sharding=jax.P(*spec[1:]))


def _split(value: jax.Array, microbatches: int) -> jax.Array:
    batch_spec = jax.typeof(value).sharding.spec
    shape = (value.shape[0] // microbatches, microbatches, *value.shape[1:])
    spec = jax.P(axes.spec("act_batch")[0], None, *batch_spec[1:])
    return jnp.swapaxes(jax.lax.reshape(value, shape, out_sharding=spec), 0, 1)
