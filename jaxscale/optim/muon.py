"""Muon: momentum whose matrices are orthogonalised by Newton-Schulz, each device working on its share of the matrices.

Only hidden matrices get it (`groups.is_hidden_matrix`), the rest of the model gets AdamW. How a sharded stack of
matrices is spread over the devices is decided in `deal.py`: read it next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale.optim.deal import ITERATIONS, Layout, Side, choose_layout, from_layout, to_layout
from jaxscale.optim.rules import Slots

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5 that drives singular values in (0, 1] to about 1 (Jordan et al. 2024)."""

RMS = 0.2
"""Root mean square of an update's entries, that of a typical AdamW update (Liu et al. 2025, section 2.2)."""


@dataclass(frozen=True)
class Muon:
    """Muon with Nesterov momentum (Jordan et al. 2024) and updates scaled to AdamW's size.

    An orthogonal (m, n) matrix has entries of root mean square 1 / sqrt(max(m, n)); each is scaled by
    0.2 sqrt(max(m, n)) (Liu et al. 2025, equation 4) rather than by sqrt(max(1, m / n)), so that the learning rate and
    weight decay found for AdamW carry over. `matrix_dims`: see `task.Parameter`.
    """

    momentum: float
    matrix_dims: tuple[int, int]

    def init(self, weights: jax.Array) -> Slots:
        return {"momentum": jnp.zeros_like(weights, dtype=jnp.float32)}

    def direction(self, gradient: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        del step
        momentum = self.momentum * slots["momentum"] + gradient
        ahead = gradient + self.momentum * momentum
        inputs, outputs = self._sides(gradient.shape)
        scale = RMS * math.sqrt(max(inputs, outputs))
        return scale * orthogonalise(ahead, self.matrix_dims), {"momentum": momentum}

    def _sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = self.matrix_dims
        return math.prod(shape[-rows - columns : -columns]), math.prod(shape[-columns:])


def orthogonalise(x: jax.Array, matrix_dims: tuple[int, int]) -> jax.Array:
    """Every matrix of a stack -> nearly U V^T of its singular value decomposition (singular values in about 0.7-1.2).

    x: (stack dims..., input dims..., output dims...), float32, any Explicit sharding of any dims; the result has
    the same shape and sharding. No device ever holds more than its share of the matrices; `planned` says how
    they are spread.
    """
    layout = planned(x.shape, _axes_by_dim(x), matrix_dims, _mesh_sizes(x))
    kernel = _on_device(matrix_dims, layout, transpose=_is_tall(x.shape, matrix_dims))
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return kernel(x)
    spec = P(*sharding.spec)
    return jax.shard_map(kernel, in_specs=spec, out_specs=spec)(x)


def planned(
    shape: tuple[int, ...],
    axes_by_dim: tuple[tuple[str, ...], ...],
    matrix_dims: tuple[int, int],
    mesh_sizes: Mapping[str, int],
) -> Layout:
    """The layout in which a parameter of this global shape and sharding is orthogonalised; a pure function."""
    stack_dims = len(shape) - sum(matrix_dims)
    first_output = len(shape) - matrix_dims[1]
    tall = _is_tall(shape, matrix_dims)
    placed: dict[str, Side] = {}
    for dim, axes in enumerate(axes_by_dim):
        if dim < stack_dims:
            side: Side = "stack"
        else:
            side = "short" if (dim < first_output) != tall else "long"
        placed.update({axis: side for axis in axes if mesh_sizes[axis] > 1})
    rows, columns = math.prod(shape[stack_dims:first_output]), math.prod(shape[first_output:])
    sizes = {axis: size for axis, size in mesh_sizes.items() if size > 1}
    return choose_layout(math.prod(shape[:stack_dims]), min(rows, columns), max(rows, columns), placed, sizes)


def newton_schulz(x_NRC: jax.Array, column_axes: tuple[str, ...] = ()) -> jax.Array:
    """Five iterations X <- aX + (bA + cA^2) X with A = X X^T on N matrices with R <= C rows (Jordan et al. 2024).

    `column_axes`: mesh axes of the surrounding `shard_map` that hold different columns; only sums and the (R, R)
    matrices A cross them. float32, also where the device's default for matmuls is less: the same on every mesh.
    """
    a, b, c = COEFFICIENTS

    def across(value: jax.Array) -> jax.Array:
        return jax.lax.psum(value, column_axes) if column_axes else value

    def iterate(_: int, x_NRC: jax.Array) -> jax.Array:
        gram_NRR = across(jnp.einsum("nrc,nsc->nrs", x_NRC, x_NRC, precision="highest"))
        square_NRR = jnp.einsum("nrs,nst->nrt", gram_NRR, gram_NRR, precision="highest")
        return a * x_NRC + jnp.einsum("nrs,nsc->nrc", b * gram_NRR + c * square_NRR, x_NRC, precision="highest")

    norm = jnp.sqrt(across(jnp.sum(jnp.square(x_NRC), axis=(1, 2), keepdims=True)))
    # The iteration needs singular values of at most 1; the epsilon leaves matrices of zeros (padding) at zero.
    return jax.lax.fori_loop(0, ITERATIONS, iterate, x_NRC / (norm + 1e-7))


def _on_device(matrix_dims: tuple[int, int], layout: Layout, transpose: bool) -> Callable[[jax.Array], jax.Array]:
    """The work of one device on its block: flatten, bring the short side first, move, iterate, and all the way back."""

    def kernel(x: jax.Array) -> jax.Array:
        first_output = x.ndim - matrix_dims[1]
        stack_dims = x.ndim - sum(matrix_dims)
        sides = tuple(
            math.prod(x.shape[a:b]) for a, b in ((0, stack_dims), (stack_dims, first_output), (first_output, x.ndim))
        )
        # Blocks flatten in the order of their own dims; where a minor dim is sharded this permutes rows or columns
        # of the whole matrix, which orthogonalisation commutes with and the way back undoes.
        x_NRC = x.reshape(sides)
        x_NRC = x_NRC.swapaxes(1, 2) if transpose else x_NRC
        done_NRC = from_layout(newton_schulz(to_layout(x_NRC, layout), layout.long), layout, sides[0])
        return (done_NRC.swapaxes(1, 2) if transpose else done_NRC).reshape(x.shape)

    return kernel


def _is_tall(shape: tuple[int, ...], matrix_dims: tuple[int, int]) -> bool:
    """Whether a matrix has more inputs than outputs, so that its columns are the short side."""
    first_output = len(shape) - matrix_dims[1]
    return math.prod(shape[len(shape) - sum(matrix_dims) : first_output]) > math.prod(shape[first_output:])


def _mesh_sizes(x: jax.Array) -> dict[str, int]:
    """Sizes of the mesh that the array lives on; empty for a single device without a mesh."""
    return dict(jax.typeof(x).sharding.mesh.shape)


def _axes_by_dim(x: jax.Array) -> tuple[tuple[str, ...], ...]:
    """Mesh axes of each dim."""
    spec = tuple(jax.typeof(x).sharding.spec)
    entries = spec + (None,) * (x.ndim - len(spec))
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)
