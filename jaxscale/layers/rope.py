"""Rotary position embeddings (Su et al. 2021) and the ways to stretch them over longer rows than were trained.

Made once per forward pass as tables of cosines and sines, then applied to queries and keys in every layer. Read next:
`layers/attention.py`.

Shapes: B rows, S positions, H heads, K head dim, F = K / 2 frequencies.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxscale.config import ConfigError
from jaxscale.models.rope_config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """(F,) float32 angles in radians per position, computed in float64. Raises ConfigError if the head dim is odd."""
    if head_dim < 2 or head_dim % 2:
        raise ConfigError(
            f"rotary embeddings turn pairs of dims, so a head dim of {head_dim} cannot work; use an even one"
        )
    theta = config.theta
    if config.scaling == "ntk" and head_dim > 2:
        theta *= config.factor ** (head_dim / (head_dim - 2))
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling == "linear":
        plain = plain / config.factor
    elif config.scaling in ("llama3", "yarn"):
        kept = _llama3_kept(config, plain) if config.scaling == "llama3" else _yarn_kept(config, head_dim)
        plain = kept * plain + (1 - kept) * plain / config.factor
    return plain.astype(np.float32)


def attention_factor(config: RopeConfig) -> float:
    """Factor of queries and of keys: YaRN's sqrt(1/t) = 0.1 ln(factor) + 1 (section 3.4), else 1."""
    return 0.1 * math.log(config.factor) + 1.0 if config.scaling == "yarn" else 1.0


def rope_tables(positions_BS: Array, head_dim: int, config: RopeConfig) -> tuple[Array, Array]:
    """(cos, sin), float32 (B, S, F) sharded as the integer positions. Make them once, outside the loop over layers."""
    angles_BSF = positions_BS.astype(jnp.float32)[..., None] * frequencies(config, head_dim)
    factor = attention_factor(config)
    return jnp.cos(angles_BSF) * factor, jnp.sin(angles_BSF) * factor


def rotate(x_BSHK: Array, tables: tuple[Array, Array]) -> Array:
    """Turns the dim pairs (f, f + F) of every head, as Llama does; float32 inside, dtype and sharding of x outside.

    The tables take on the sharding of x's rows and positions first: x may hold whole rows where they are split.
    """
    rows, positions = (*jax.typeof(x_BSHK).sharding.spec, None, None)[:2]
    cos_BS1F, sin_BS1F = (jax.reshard(table, P(rows, positions, None))[:, :, None] for table in tables)
    first, second = jnp.split(x_BSHK.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos_BS1F - second * sin_BS1F, second * cos_BS1F + first * sin_BS1F)
    return jnp.concatenate(turned, axis=-1).astype(x_BSHK.dtype)


def _llama3_kept(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Share of each frequency that is left alone: linear in the turns over the original length, between the factors."""
    turns = config.original_length * plain / (2 * math.pi)
    return np.clip(
        (turns - config.low_frequency_factor) / (config.high_frequency_factor - config.low_frequency_factor), 0, 1
    )


def _yarn_kept(config: RopeConfig, head_dim: int) -> np.ndarray:
    """The same for YaRN, as its released models have it: linear in the frequency's index between whole indices.

    (The paper, section 3.2, is linear in the turns; weights were trained with the authors' code, which is this.)
    """

    def index_of(turns: float) -> float:
        return head_dim * math.log(config.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    first = max(math.floor(index_of(config.beta_fast)), 0)
    last = min(math.ceil(index_of(config.beta_slow)), head_dim - 1)
    index = np.arange(head_dim // 2, dtype=np.float64)
    return 1 - np.clip((index - first) / max(last - first, 1e-3), 0, 1)
