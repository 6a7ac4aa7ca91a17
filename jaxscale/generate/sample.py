"""Logits -> token: temperature, top-k, top-p, with keys from (seed, row, position), so that any mesh draws the same.

Pure. Read next: `text.py`. Legend: B batch rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.config import ConfigError


class GenerateError(ConfigError):
    """A request that cannot be generated. The message says what, why, and how to fix it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The settings apply in this order."""

    vocabulary: int
    """Only ids below this are drawn: a model may have more than its tokenizer."""
    temperature: float = 1.0
    """Divides the logits; 0 = the likeliest token, always."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 = from all (Fan et al. 2018)."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens with this probability in sum (Holtzman et al. 2020); 1 = from all."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise GenerateError(f"temperature is {self.temperature}; use 0 (the likeliest token) or a positive number")
        if self.top_k < 0:
            raise GenerateError(f"top-k is {self.top_k}; use 1 or more, or 0 to draw from all tokens")
        if not 0 < self.top_p <= 1:
            raise GenerateError(f"top-p is {self.top_p}; it is a probability above 0, and 1 draws from all tokens")


def sample(
    sampling: Sampling, logits_BV: jax.Array, seed: jax.Array, row_B: jax.Array, position_B: jax.Array
) -> jax.Array:
    """Draws the token at `position_B` of each row: int32 (B,), sharded as the rows. Traceable.

    logits_BV: float32, sharded over rows alone; seed: uint32 scalar; row_B, position_B: int32, any sharding. Rows with
    equal logits, seed, row and position draw the same token, on whatever device.
    """
    rows = axes.spec("act_batch")
    mapped = jax.shard_map(
        jax.vmap(partial(_sample, sampling), in_axes=(0, None, 0, 0)),
        in_specs=(axes.spec("act_batch", None), P(), rows, rows),
        out_specs=rows,
    )
    token_B: jax.Array = mapped(logits_BV, seed, jax.reshard(row_B, rows), jax.reshard(position_B, rows))
    return token_B


def _sample(sampling: Sampling, logits_V: jax.Array, seed: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
    logits_V = logits_V[: sampling.vocabulary]
    if sampling.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    logits_V = logits_V / sampling.temperature
    logits_V = jnp.where(allowed(logits_V, sampling.top_k, sampling.top_p), logits_V, -jnp.inf)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


def allowed(logits_V: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Bool (V,): which tokens may be drawn. Of equally likely tokens the lower ids come first; one is always left.

    top-p looks at the probabilities among the top-k tokens: a token stays if those before it have less than top_p.
    """
    V = logits_V.shape[0]
    if not 0 < top_k < V and top_p == 1:
        return jnp.ones((V,), bool)
    order_V = jnp.argsort(-logits_V, stable=True)
    is_kept_V = jnp.arange(V) < (top_k or V)
    if top_p < 1:
        probability_V = jax.nn.softmax(jnp.where(is_kept_V, logits_V[order_V], -jnp.inf))
        is_kept_V &= jnp.cumsum(probability_V) - probability_V < top_p
    return jnp.zeros((V,), bool).at[order_V].set(is_kept_V, unique_indices=True)
