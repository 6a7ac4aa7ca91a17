"""What is sent in place of float32 numbers: fewer bits of each, or fewer of them. Pure, on one device's arrays.

Whatever comes back is computed from what was sent, never from what a device knows beside it: so all slices find the
same bits. Read next: `gradient_exchange.py`, which sends.

Shapes: N numbers of one device's part of a weight, in blocks of C, A blocks; L layers, K numbers sent of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Noise = jax.Array
"""Uniform in [0, 1), one for each number: what stochastic rounding rounds up with."""


class Codec(Protocol):
    """Fewer bits for each number, N float32 -> a message -> N float32."""

    @property
    def multiple(self) -> int:
        """N is one of."""
        ...

    def encode(self, x_N: jax.Array, noise_N: Noise) -> jax.Array:
        """The message, a vector of integers."""
        ...

    def decode(self, message: jax.Array) -> jax.Array:
        """What a message says, float32."""
        ...


@dataclass(frozen=True)
class Float32:
    """All there is."""

    multiple: int = 1

    def encode(self, x_N: jax.Array, noise_N: Noise) -> jax.Array:
        del noise_N
        return x_N

    def decode(self, message: jax.Array) -> jax.Array:
        return message


@dataclass(frozen=True)
class BFloat16:
    """Half the bits, rounded to the nearest. Sent as integers: some compilers would widen floats for the way."""

    multiple: int = 1

    def encode(self, x_N: jax.Array, noise_N: Noise) -> jax.Array:
        del noise_N
        return jax.lax.bitcast_convert_type(x_N.astype(jnp.bfloat16), jnp.uint16)

    def decode(self, message: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(message, jnp.bfloat16).astype(jnp.float32)


@dataclass(frozen=True)
class Quantised:
    """8 or 4 bits a number, and a float32 scale for each block (QSGD: Alistarh et al. 2017, with blocks).

    Rounding is stochastic: the mean of what is sent is what was to be sent, and errors of many steps and slices cancel
    instead of adding up. A block that is not finite comes out as NaN, so that its step is skipped as ever.
    """

    bits: int
    block: int

    @property
    def multiple(self) -> int:
        return self.block

    @property
    def largest(self) -> int:
        """Integers are in [-largest, largest]."""
        return 2 ** (self.bits - 1) - 1

    def encode(self, x_N: jax.Array, noise_N: Noise) -> jax.Array:
        x_AC, noise_AC = (v.reshape(-1, self.block) for v in (x_N, noise_N))
        scale_A = jnp.max(jnp.abs(x_AC), axis=1) / self.largest
        whole = jnp.floor(x_AC / jnp.where(scale_A > 0, scale_A, 1)[:, None] + noise_AC)
        integers = jnp.clip(whole, -self.largest, self.largest).astype(jnp.int8).reshape(-1)
        if self.bits == 4:  # two in a byte
            pairs = integers.reshape(-1, 2)
            integers = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
        return jnp.concatenate([integers, jax.lax.bitcast_convert_type(scale_A, jnp.int8).reshape(-1)])

    def decode(self, message: jax.Array) -> jax.Array:
        blocks = message.shape[0] // (self.block * self.bits // 8 + 4)
        integers, scales = message[: -4 * blocks], message[-4 * blocks :]
        scale_A = jax.lax.bitcast_convert_type(scales.reshape(blocks, 4), jnp.float32)
        if self.bits == 4:
            low, high = (integers << 4) >> 4, integers >> 4  # arithmetic shifts: the sign comes along
            integers = jnp.stack([low, high], axis=1).reshape(-1)
        return (integers.reshape(blocks, self.block).astype(jnp.float32) * scale_A[:, None]).reshape(-1)


def rounding_noise(key: jax.Array, shape: tuple[int, ...], spec: P) -> Noise:
    """Uniform numbers in [0, 1) for a whole weight: each from the key and its place, whichever device has it.

    A hash in place of `jax.random`, whose Threefry takes some 100 operations a number, and seconds to compile on CPUs:
    rounding needs no better (the mixing is MurmurHash3's, by Austin Appleby, once with each half of the key).
    """
    index = jnp.zeros(shape, jnp.uint32, out_sharding=spec)
    for dim, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, dim, out_sharding=spec)
    bits = index
    for half in jax.random.key_data(key)[-2:]:
        bits = mixed(bits ^ half)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def mixed(x: jax.Array) -> jax.Array:
    """A hash of each number, uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def padded(x_N: jax.Array, multiple: int) -> jax.Array:
    """Filled up with zeros to a multiple of a size."""
    return jnp.pad(x_N, (0, -x_N.shape[0] % multiple))


def largest(x_LN: jax.Array, share: float) -> jax.Array:
    """Places (L, K) of the numbers of largest magnitude in each layer; what is not finite is among them.

    Lin et al. 2018, "Deep Gradient Compression".
    """
    # A NaN has to be sent, or it would stay in the residual for ever.
    magnitude = jnp.where(jnp.isfinite(x_LN), jnp.abs(x_LN), jnp.inf)
    return jax.lax.top_k(magnitude, count(x_LN.shape[1], share))[1]


def drawn(key: jax.Array, n: int, share: float) -> jax.Array:
    """Places (K,), one in each of K equal parts of N, drawn at random: any number is as likely as any other.

    Places behind the end stand for nothing. The same for everybody who has the key, so that no place has to be sent.
    """
    size = math.ceil(n / count(n, share))
    parts = math.ceil(n / size)
    return jnp.arange(parts) * size + jax.random.randint(key, (parts,), 0, size)


def count(n: int, share: float) -> int:
    """How many of n numbers are sent: at least 1."""
    return max(1, round(n * share))
