"""Matrix products of numbers in eight bits, scaled as they come: int8 and fp8 in place of `precision.compute`.

Each operand gets one scale for each row that is contracted (of activations: for each token, of weights: for each
output), from its largest magnitude there, then is rounded to eight bits; the product is summed in int32 or float32 and
multiplied by both scales. No state, no calibration (as in AQT: Abdolrashidi et al. 2021, "Pareto-Optimal Quantized
ResNet Is Mostly 4-bit"; formats of fp8: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"). Gradients pass the
rounding as if it were none (straight-through). What each product of a layer is made of:

    precision.matmul   y = x w        dx = dy w                            dw = x dy
    compute            compute        compute                              compute
    int8               int8 x int8    int8, dy rounded stochastically      compute
    fp8                e4m3 x e4m3    dy in e5m2, w in e4m3                x in e4m3, dy in e5m2

A weight's gradient stays exact with int8: it sums over all tokens of a device, and one scale for so many small numbers
next to a few large ones would lose most of them; fp8 keeps small numbers by their exponents. Scales are those of a
device's own part of an operand, so nothing is sent for them, and rounding depends on the mesh as sums do. Read next:
`../layers/reduce.py`, which calls these inside its manual regions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxscale.parallel.compress import mixed

Multiply = Callable[[str, jax.Array, jax.Array, DTypeLike], jax.Array]
"""(einsum equation of two operands, left, right, dtype of the result) -> their product, on one device."""


@dataclass(frozen=True)
class Format:
    """Numbers in eight bits: their dtype, and the magnitude that the largest of a row gets."""

    dtype: DTypeLike
    largest: float
    sums: DTypeLike
    """Dtype in which products are added up."""


INT8 = Format(jnp.int8, 127.0, jnp.int32)
E4M3 = Format(jnp.float8_e4m3fn, 448.0, jnp.float32)
E5M2 = Format(jnp.float8_e5m2, 57344.0, jnp.float32)


@dataclass(frozen=True)
class Products:
    """How a layer multiplies: forward (x, w), backward for the input (dy, w), and for the weight (x, dy)."""

    forward: Multiply
    of_input: Multiply
    of_weight: Multiply


def exact(equation: str, left: jax.Array, right: jax.Array, dtype: DTypeLike) -> jax.Array:
    """As the operands are; accumulated in float32."""
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def multiply(
    formats: tuple[Format, Format],
    stochastic: bool,
    equation: str,
    left: jax.Array,
    right: jax.Array,
    dtype: DTypeLike,
) -> jax.Array:
    """The product of both operands in eight bits. stochastic: the left one is rounded up or down by chance.

    What is not finite in an operand makes its rows of the result NaN or infinite.
    """
    (of_left, of_right), result = equation.split("->")[0].split(","), equation.split("->")[1]
    left_values, left_scale = quantise(formats[0], left, _places(of_left, result), stochastic)
    right_values, right_scale = quantise(formats[1], right, _places(of_right, result), False)
    total = jnp.einsum(equation, left_values, right_values, preferred_element_type=formats[0].sums)
    scales = (_aligned(left_scale, of_left, result), _aligned(right_scale, of_right, result))
    return (total.astype(jnp.float32) * scales[0] * scales[1]).astype(dtype)


def quantise(
    to: Format, x: jax.Array, contracted: tuple[int, ...], stochastic: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(values in eight bits, float32 scales without the contracted dims): x is about values times scales."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=contracted, keepdims=True)
    # At least a normal number: of a row of smaller ones the quotient would be none, and 0 / 0 not a number.
    scale = jnp.maximum(largest / to.largest, jnp.finfo(jnp.float32).tiny)
    scaled = wide / scale
    if to is INT8:
        scaled = jnp.floor(scaled + chance(wide)) if stochastic else jnp.round(scaled)
        scaled = jnp.clip(scaled, -to.largest, to.largest)
    return scaled.astype(to.dtype), jnp.squeeze(scale, contracted)


def chance(x: jax.Array) -> jax.Array:
    """A number in [0, 1) for each of `x`, float32: a hash of its bits and its place, the same whenever it is computed.

    Rounding up where it exceeds what is missing is right in the mean over numbers and steps, without a key.
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    bits = mixed(mixed(place) ^ jax.lax.bitcast_convert_type(x, jnp.uint32))
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


PRODUCTS = {
    "compute": Products(exact, exact, exact),
    "int8": Products(partial(multiply, (INT8, INT8), False), partial(multiply, (INT8, INT8), True), exact),
    "fp8": Products(
        partial(multiply, (E4M3, E4M3), False),
        partial(multiply, (E5M2, E4M3), False),
        partial(multiply, (E4M3, E5M2), False),
    ),
}
"""By the name that `precision.matmul` has for them."""


def note(matmul: str, platform: str, peaks: dict[str, float]) -> str:
    """What a person has to know of these products on the devices of a run; empty: they are as fast as they can be.

    peaks: FLOP/s of a device by dtype of the operands; empty where the chip is not known.
    """
    if matmul == "compute":
        return ""
    kind = {"int8": "int8", "fp8": "float8"}[matmul]
    begin = f"precision.matmul {matmul}: "
    if platform == "cpu":
        return begin + "CPUs compute with these numbers for tests and comparisons; it is slower than without"
    if not peaks:
        return begin + "what this chip makes of it is not known; compare the time of a step with matmul compute"
    if peaks.get(kind, 0.0) <= peaks.get("bfloat16", 0.0):
        return begin + f"this chip multiplies {kind} no faster than bfloat16: numbers are rounded and nothing is gained"
    return ""


def _places(dims: str, result: str) -> tuple[int, ...]:
    """Of the contracted dims."""
    return tuple(place for place, letter in enumerate(dims) if letter not in result)


def _aligned(scale: jax.Array, dims: str, result: str) -> jax.Array:
    """Scales with a dim for each of the result's, 1 where they have none."""
    own = "".join(letter for letter in dims if letter in result)
    wanted = "".join(letter for letter in result if letter in own)
    ordered = jnp.einsum(f"{own}->{wanted}", scale)
    return jnp.expand_dims(ordered, tuple(place for place, letter in enumerate(result) if letter not in own))
