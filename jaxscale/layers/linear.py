"""Matrix products with sharded weights, and their gradients: where FSDP and tensor parallelism happen.

Legend: B batch rows, S sequence, D width, F hidden width, H heads, K head dim.

A weight is stored in float32, sharded over `fsdp` (and `tensor`). At its use it is cast to the compute dtype and then
gathered over `fsdp`, so the gather moves half the bytes. The gradient rule is written out because autodiff would reduce
the weight's gradient in the compute dtype and would gather activations more often than needed:

    forward    x gathered over the sequence's tensor shards once, for all weights that read it
    backward   the input's gradient: partial sums of all weights added first, then reduced and scattered once
               a weight's gradient: contracted in the reduce dtype, reduce-scattered over `fsdp`, then summed
               over `data`

Sums over devices are in `reduce.py`. Read next: `layers/attention.py` and `layers/mlp.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.layers.reduce import contract
from jaxscale.ops.quantised import PRODUCTS
from jaxscale.parallel.zero import Weight, at_use, for_backward, gradient_of, gradient_spec
from jaxscale.precision import Precision


@dataclass(frozen=True)
class Projection:
    """One product `x . w -> y`. Specs are those *during* the product; letters follow the file's legend.

    equation: einsum such as "BSD,DHK->BSHK"; weight: logical axes of the stored weight; x, y: specs of operand and
    result while multiplying (the sequence not split over `tensor`); out: spec of the result that is handed on.
    """

    equation: str
    weight: tuple[str | None, ...]
    x: P
    y: P
    out: P


def column(equation: str, weight: tuple[str | None, ...], y: P) -> Projection:
    """A product whose outputs are split over `tensor` (queries, keys, values, the MLP's hidden units)."""
    return Projection(equation, weight, x=axes.spec("act_batch", "act_sequence", "act_embed"), y=y, out=y)


def row(equation: str, weight: tuple[str | None, ...], x: P) -> Projection:
    """A product that contracts what is split over `tensor`; the result goes back to the residual stream."""
    return Projection(
        equation,
        weight,
        x=x,
        y=axes.spec("act_batch", "act_sequence", "act_embed"),
        out=axes.spec("act_batch", "act_residual_sequence", "act_embed"),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project(
    projections: tuple[Projection, ...], precision: Precision, x: jax.Array, weights: tuple[Weight, ...]
) -> tuple[jax.Array, ...]:
    """`y_i = einsum(equation_i, x, weights_i)` for weights that read the same input.

    x: compute dtype, (B, S, ...), any sharding of the sequence. weights: stored dtype and sharding. Returns the
    products in the compute dtype with spec `projections[i].out`.
    """
    outputs, _ = _forward(projections, precision, x, weights)
    return outputs


def _forward(
    projections: tuple[Projection, ...], precision: Precision, x: jax.Array, weights: tuple[Weight, ...]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, tuple[Weight, ...]]]:
    gathered, multiply = jax.reshard(x, projections[0].x), PRODUCTS[precision.matmul].forward
    outputs = tuple(
        contract([(p.equation, gathered, at_use(w, p.weight, precision.compute))], p.out, precision.compute, multiply)
        for p, w in zip(projections, weights, strict=True)
    )
    return outputs, (x, tuple(map(for_backward, weights)))


def _backward(
    projections: tuple[Projection, ...],
    precision: Precision,
    residuals: tuple[jax.Array, tuple[Weight, ...]],
    gradients: tuple[jax.Array, ...],
) -> tuple[jax.Array, tuple[Weight, ...]]:
    x, weights = residuals
    gathered, products = jax.reshard(x, projections[0].x), PRODUCTS[precision.matmul]
    parts, weight_gradients = [], []
    for p, w, dy in zip(projections, weights, gradients, strict=True):
        operands, y_dims = p.equation.split("->")
        x_dims, w_dims = operands.split(",")
        dy = jax.reshard(dy, p.y)
        parts.append((f"{y_dims},{w_dims}->{x_dims}", dy, at_use(w, p.weight, precision.compute)))
        outer = (f"{x_dims},{y_dims}->{w_dims}", gathered, dy)
        dw = contract([outer], gradient_spec(w, p.weight), precision.reduce, products.of_weight)
        weight_gradients.append(gradient_of(w, dw))
    dx = contract(parts, jax.typeof(x).sharding.spec, precision.compute, products.of_input)
    return dx, tuple(weight_gradients)


project.defvjp(_forward, _backward)
