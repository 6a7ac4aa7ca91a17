"""PowerSGD: of each slice's gradient matrix only its product with a few vectors crosses the slow links.

One step of power iteration from where the last step's ended (Vogels et al. 2019): P = sum of M Q over slices, made
orthonormal; Q = sum of M' P. The sum of gradients is about P Q'. What a slice did not get across stays in its residual.
Works on global matrices whatever they are split over inside a slice, so its state does not depend on the mesh. Read
next: `gradient_exchange.py`.
"""

from __future__ import annotations

import math
import string

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.optim.groups import matrix_sides, stack_dims
from jaxscale.parallel.slices import total
from jaxscale.task import Parameter


def pays(parameter: Parameter, rank: int) -> bool:
    """Whether the two factors are smaller than the weight."""
    sides = matrix_sides(parameter)
    if sides is None:
        return False
    rows, columns = (math.prod(parameter.shape[d] for d in side) for side in sides)
    return rank * (rows + columns) < rows * columns


def init_right(parameter: Parameter, rank: int, key: jax.Array) -> jax.Array:
    """The first Q, (layers, columns..., rank), equal on all slices. Q's size means nothing: P is made orthonormal."""
    sides = matrix_sides(parameter)
    assert sides is not None
    kept = [*range(stack_dims(parameter)), *sides[1]]
    shape = (*(parameter.shape[d] for d in kept), rank)
    spec = axes.spec(*(parameter.axes[d] for d in kept), None)
    return jax.random.normal(key, shape, jnp.float32, out_sharding=spec)


def approximate(parameter: Parameter, m: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum over slices of what is sent, what this slice's part of it was, next Q). Inside `on_each_slice`.

    m: float32, this slice's gradient with its residual, sharded as the parameter; right: Q of the step before.
    """
    sides = matrix_sides(parameter)
    assert sides is not None
    dims = string.ascii_letters[: m.ndim]
    stack, rows, columns = (
        "".join(dims[d] for d in side) for side in (range(stack_dims(parameter)), sides[0], sides[1])
    )
    by_letter = dict(zip(dims, (axes.spec(name)[0] for name in parameter.axes), strict=True))

    def product(equation: str, *operands: jax.Array) -> jax.Array:
        out = P(*(by_letter.get(letter) for letter in equation.split("->")[1]))
        return jnp.einsum(equation, *operands, out_sharding=out, preferred_element_type=jnp.float32)

    left = total(product(f"{dims},{stack}{columns}Z->{stack}{rows}Z", m, right))
    left = _orthonormal(left, len(stack), P(*(by_letter[letter] for letter in stack)))
    own = product(f"{dims},{stack}{rows}Z->{stack}{columns}Z", m, left)
    right = total(own)
    back = f"{stack}{rows}Z,{stack}{columns}Z->{dims}"
    return product(back, left, right), product(back, left, own), right


def _orthonormal(left: jax.Array, stack: int, spec: P) -> jax.Array:
    """Orthonormal columns that span P's, (layers, rows..., rank): small, so each device does it for whole columns."""
    before = jax.typeof(left).sharding.spec
    whole = P(*spec, *[None] * (left.ndim - stack))

    def factor(left: jax.Array) -> jax.Array:
        flat = left.reshape(*left.shape[:stack], -1, left.shape[-1])
        return jnp.linalg.qr(flat)[0].reshape(left.shape)

    region = jax.shard_map(factor, in_specs=whole, out_specs=whole, axis_names=axes.automatic(), check_vma=False)
    return jax.reshard(region(jax.reshard(left, whole)), before)
