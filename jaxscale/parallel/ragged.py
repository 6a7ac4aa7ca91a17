"""Tokens to their experts and back without empty slots, for backends with ragged collectives and products (TPU).

A device sorts its copies of tokens by expert and sends each device of `expert` as many as it has for it
(`jax.lax.ragged_all_to_all`; elsewhere the same moves are made of a gather, so that tests run on CPU). Who has an
expert sorts what came by expert and multiplies group by group (`jax.lax.ragged_dot`). Work and traffic are those of the
tokens there are; only the buffer of what may come has the worst case's size. Read next: `../layers/moe.py`.

Legend: R rows of a buffer (copies of tokens), D width, F hidden units, E experts, K experts of a token; b, s, r, e: on
one device; P devices of `expert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscale import axes
from jaxscale.layers.reduce import names, reduce_scatter
from jaxscale.parallel.expert import EXPERT, TOKENS
from jaxscale.parallel.zero import Weight, at_use, for_backward, gradient_of, gradient_spec
from jaxscale.precision import Precision

ROWS = ("act_residual_rows",)
"""Logical axes of the rows of a buffer: each device has its own."""
WHOLE_ROWS = ("act_rows",)
"""The same while multiplying, when the devices of `tensor` have all of theirs."""
IN, OUT = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
WEIGHTS = (("gate", IN), ("up", IN), ("down", OUT))
"""Logical axes by name."""
Weights = Mapping[str, Weight]
Whole = dict[str, jax.Array]
"""Weights at their use, or their gradients."""


_Residuals = tuple[jax.Array, jax.Array, dict[str, Weight], jax.Array, jax.Array]


class Moves(NamedTuple):
    """Who sends what, of one device: its rows sorted by expert, and the arguments of `ragged_all_to_all`."""

    order_R: jax.Array
    """Copy of a token (token K + k) that each sent row is."""
    sent_from_P: jax.Array
    sent_P: jax.Array
    arrives_at_P: jax.Array
    came_P: jax.Array
    expert_r: jax.Array
    """Of the device's own experts, that of each row that came; as many as it has = no row."""


def to_experts(
    x_BSD: jax.Array, choice_BSK: jax.Array, real_BS: jax.Array, experts: int
) -> tuple[jax.Array, jax.Array]:
    """Copies of tokens at their experts: (R, D), and which of its device's experts each is for: int32 (R,)."""
    tokens, rows = axes.spec(*TOKENS), axes.spec(*ROWS)

    def body(x_bsD: jax.Array, choice_bsk: jax.Array, real_bs: jax.Array) -> tuple[jax.Array, jax.Array]:
        moves = _moves(choice_bsk, real_bs, experts)
        sent_RD = x_bsD.reshape(-1, x_bsD.shape[-1])[moves.order_R // choice_bsk.shape[-1]]
        empty_rD = jnp.zeros((moves.expert_r.shape[0], x_bsD.shape[-1]), x_bsD.dtype)
        sizes = (moves.sent_from_P, moves.sent_P, moves.arrives_at_P, moves.came_P)
        return _exchange(sent_RD, empty_rD, *sizes), moves.expert_r

    region = jax.shard_map(
        body, in_specs=(tokens,) * 3, out_specs=(rows, rows), axis_names=axes.automatic(), check_vma=False
    )
    return region(x_BSD, choice_BSK, real_BS)


def from_experts(
    y_RD: jax.Array, choice_BSK: jax.Array, real_BS: jax.Array, gates_BSK: jax.Array, experts: int
) -> jax.Array:
    """The way back: (B, S, D), each token's sum over its experts weighted by its gates, added up in float32."""
    tokens, rows = axes.spec(*TOKENS), axes.spec(*ROWS)

    def body(y_rD: jax.Array, choice_bsk: jax.Array, real_bs: jax.Array, gates_bsk: jax.Array) -> jax.Array:
        moves = _moves(choice_bsk, real_bs, experts)
        b, s, k = choice_bsk.shape
        came_from_P, back_to_P = (_swap(of) for of in (moves.arrives_at_P, moves.sent_from_P))
        empty_RD = jnp.zeros((b * s * k, y_rD.shape[-1]), y_rD.dtype)
        back_RD = _exchange(y_rD, empty_RD, came_from_P, moves.came_P, back_to_P, moves.sent_P)
        found_RD = jnp.zeros_like(back_RD).at[moves.order_R].set(back_RD, unique_indices=True)
        found_bskD = found_RD.reshape(b, s, k, -1).astype(jnp.float32)
        return jnp.sum(gates_bsk[..., None] * found_bskD, axis=2).astype(y_rD.dtype)

    region = jax.shard_map(
        body, in_specs=(rows, tokens, tokens, tokens), out_specs=tokens, axis_names=axes.automatic(), check_vma=False
    )
    return region(y_RD, choice_BSK, real_BS, gates_BSK)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def each_expert(precision: Precision, x_RD: jax.Array, expert_R: jax.Array, weights: Weights) -> jax.Array:
    """down(silu(gate(x)) * up(x)) of each row's expert: (R, D) sharded as ROWS. weights: gate, up (E, D, F), down.

    The gradient rule is written out for the reasons of `layers/linear.py`.
    """
    return _forward(precision, x_RD, expert_R, weights)[0]


def _forward(
    precision: Precision, x_RD: jax.Array, expert_R: jax.Array, weights: Weights
) -> tuple[jax.Array, _Residuals]:
    rows, hidden = axes.spec(*ROWS), axes.spec(*WHOLE_ROWS, "act_mlp")

    def body(x_rD: jax.Array, expert_r: jax.Array, weights: Whole) -> tuple[jax.Array, jax.Array, jax.Array]:
        groups = _Groups(expert_r, weights["up"].shape[0], precision)
        x_rD = groups.sort(_gather_rows(x_rD))
        gate_rF, up_rF = (groups.product(x_rD, weights[name]) for name in ("gate", "up"))
        y_rD = groups.product(jax.nn.silu(gate_rF) * up_rF, weights["down"])
        return _scatter_rows(groups.unsort(y_rD)), gate_rF, up_rF

    region = jax.shard_map(
        body,
        in_specs=(rows, rows, _specs(axes.gathered_spec)),
        out_specs=(rows, hidden, hidden),
        axis_names=axes.automatic(),
        check_vma=False,
    )
    y_RD, gate_RF, up_RF = region(x_RD, expert_R, _gathered(precision, weights))
    return y_RD, (x_RD, expert_R, {name: for_backward(w) for name, w in weights.items()}, gate_RF, up_RF)


def _backward(precision: Precision, residuals: _Residuals, dy_RD: jax.Array) -> tuple[jax.Array, None, Weights]:
    x_RD, expert_R, stored, gate_RF, up_RF = residuals
    rows, hidden = axes.spec(*ROWS), axes.spec(*WHOLE_ROWS, "act_mlp")
    summed = {axis for entry in axes.spec(*WHOLE_ROWS) for axis in names(entry)} - set(axes.mesh_axes("experts"))
    whole, kept = (
        _specs(axes.gathered_spec),
        {name: gradient_spec(stored[name], weight_axes) for name, weight_axes in WEIGHTS},
    )

    def body(
        x_rD: jax.Array, expert_r: jax.Array, weights: Whole, gate_rF: jax.Array, up_rF: jax.Array, dy_rD: jax.Array
    ) -> tuple[jax.Array, Whole]:
        groups = _Groups(expert_r, weights["up"].shape[0], precision)
        x_rD, dy_rD = (groups.sort(_gather_rows(value)) for value in (x_rD, dy_rD))
        hidden_rF, of_hidden = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_rF, up_rF)
        dgate_rF, dup_rF = of_hidden(groups.product(dy_rD, weights["down"].swapaxes(1, 2)))
        dx_rD = groups.product(dgate_rF, weights["gate"].swapaxes(1, 2))
        dx_rD += groups.product(dup_rF, weights["up"].swapaxes(1, 2))
        pairs = {"gate": (x_rD, dgate_rF), "up": (x_rD, dup_rF), "down": (hidden_rF, dy_rD)}
        gradients = {
            name: _to_store(groups.outer(*pair), whole[name], kept[name], summed) for name, pair in pairs.items()
        }
        return _scatter_rows(groups.unsort(dx_rD)), gradients

    region = jax.shard_map(
        body,
        in_specs=(rows, rows, whole, hidden, hidden, rows),
        out_specs=(rows, kept),
        axis_names=axes.automatic(),
        check_vma=False,
    )
    dx_RD, gradients = region(x_RD, expert_R, _gathered(precision, stored), gate_RF, up_RF, dy_RD)
    return dx_RD, None, {name: gradient_of(stored[name], gradient) for name, gradient in gradients.items()}


each_expert.defvjp(_forward, _backward)


class _Groups:
    """Rows of one device, sorted by expert while they are multiplied. Rows of no expert come last and stay zero."""

    def __init__(self, expert_r: jax.Array, experts: int, precision: Precision) -> None:
        expert_r = _gather_rows(expert_r)
        self._precision = precision
        self._order_r = jnp.argsort(expert_r, stable=True)
        self._sizes_e = jnp.sum(expert_r[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
        self._is_row_r = jnp.arange(expert_r.shape[0]) < jnp.sum(self._sizes_e)

    def sort(self, rows: jax.Array) -> jax.Array:
        return jnp.where(self._is_row_r[:, None], rows[self._order_r], 0)

    def unsort(self, rows: jax.Array) -> jax.Array:
        return jnp.zeros_like(rows).at[self._order_r].set(rows, unique_indices=True)

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """Each row times its expert's matrix, in the compute dtype."""
        found = jax.lax.ragged_dot(rows, weights, self._sizes_e, preferred_element_type=self._precision.compute)
        return jnp.where(self._is_row_r[:, None], found, 0)

    def outer(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Per expert the sum of its rows' outer products, in the dtype of reductions."""
        contracted = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(
            left, right, self._sizes_e, contracted, preferred_element_type=self._precision.reduce
        )


def _moves(choice_bsk: jax.Array, real_bs: jax.Array, experts: int) -> Moves:
    """Found out anew on the way back, which costs a sort of numbers and no memory between."""
    P, me = jax.lax.axis_size(EXPERT), jax.lax.axis_index(EXPERT)
    own = experts // P
    expert_R = jnp.where(real_bs[..., None], choice_bsk, experts).reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)
    count_E = jnp.sum(expert_R[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    count_PPe = jax.lax.all_gather(count_E, EXPERT).reshape(P, P, own)  # sender, receiver, its experts
    count_PP = jnp.sum(count_PPe, axis=2)
    sent_P, came_P = count_PP[me], count_PP[:, me]
    # Rows come sender after sender, each one's sorted by expert.
    ends = jnp.cumsum(count_PPe[:, me].reshape(-1))
    room = P * real_bs.size * min(choice_bsk.shape[-1], own)
    place_r = jnp.arange(room)
    which_r = jnp.searchsorted(ends, place_r, side="right")
    expert_r = jnp.where(place_r < ends[-1], which_r % own, own).astype(jnp.int32)
    arrives_at_P = (jnp.cumsum(count_PP, axis=0) - count_PP)[me]
    return Moves(order_R, jnp.cumsum(sent_P) - sent_P, sent_P, arrives_at_P, came_P, expert_r)


def _exchange(
    rows: jax.Array,
    into: jax.Array,
    sent_from_P: jax.Array,
    sent_P: jax.Array,
    arrives_at_P: jax.Array,
    came_P: jax.Array,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all` over `expert`, or the same by a gather where the backend has none."""
    if jax.lax.axis_size(EXPERT) == 1:
        return rows
    if native():
        return jax.lax.ragged_all_to_all(rows, into, sent_from_P, sent_P, arrives_at_P, came_P, axis_name=EXPERT)
    gathered_PRD = jax.lax.all_gather(rows, EXPERT)
    begin_P, came_from_P = _swap(arrives_at_P), _swap(sent_from_P)
    place_r = jnp.arange(into.shape[0])
    is_of_rP = (place_r[:, None] >= begin_P) & (place_r[:, None] < begin_P + came_P)
    sender_r = jnp.argmax(is_of_rP, axis=1)
    place_there_r = place_r - begin_P[sender_r] + came_from_P[sender_r]
    found_rD = gathered_PRD.at[sender_r, place_there_r].get(mode="clip")
    return jnp.where(jnp.any(is_of_rP, axis=1)[:, None], found_rD, into)


def native() -> bool:
    """Whether the backend of the current mesh has ragged collectives and products of its own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def _swap(of_P: jax.Array) -> jax.Array:
    """What each device has for this one."""
    return of_P if jax.lax.axis_size(EXPERT) == 1 else jax.lax.all_to_all(of_P, EXPERT, 0, 0, tiled=True)


def _gather_rows(rows: jax.Array) -> jax.Array:
    return rows if jax.lax.axis_size("tensor") == 1 else jax.lax.all_gather(rows, "tensor", tiled=True)


def _scatter_rows(rows: jax.Array) -> jax.Array:
    return rows if jax.lax.axis_size("tensor") == 1 else jax.lax.psum_scatter(rows, "tensor", tiled=True)


def _specs(of: Callable[[tuple[str, ...]], jax.P]) -> dict[str, jax.P]:
    return {name: of(weight) for name, weight in WEIGHTS}


def _gathered(precision: Precision, weights: Weights) -> Whole:
    return {name: at_use(weights[name], weight_axes, precision.compute) for name, weight_axes in WEIGHTS}


def _to_store(gradient: jax.Array, whole: jax.P, kept: jax.P, summed: set[str]) -> jax.Array:
    """The sum over the devices that have rows of the same experts: a weight at its use -> as it is stored."""
    return reduce_scatter(gradient, [names(entry) for entry in whole], summed, kept)
