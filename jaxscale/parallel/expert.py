"""Tokens to their experts and back: all-to-alls over the mesh axis `expert`, in blocks of a size known beforehand.

A device sorts its tokens into a block of slots for each expert, sends every block to the device that has the expert,
and finds what comes back by the same slots. Without a capacity a block has room for all tokens of the device, since all
might want one expert: exact, and E / K times the work of the tokens. With one, the first tokens of each row get
room; whether a token does depends on the tokens of its row before it alone, so on no mesh and no later token.
`ragged.py` moves exactly the tokens there are. Read next: `../layers/moe.py`.

Legend: B rows, S sequence, D width, E experts, K experts of a token, C slots of an expert; b, s, c: on one device.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxscale import axes

EXPERT = "expert"
SEQUENCE = axes.mesh_axes("act_residual_sequence")
TOKENS = ("act_batch", "act_residual_sequence")
"""Logical axes of what each token has: the first dims."""
AT_EXPERTS = ("act_experts", "act_residual_slots", "act_embed")
"""Logical axes of tokens that are with their experts: (E, C, D)."""
NOWHERE = jnp.iinfo(jnp.int32).max
"""The slot of a token that no expert takes."""


def row_capacity(factor: float | None, sequence: int, top_k: int, experts: int) -> int | None:
    """Tokens of a row that an expert takes at most: `factor` times an even share, rounded up. None = all."""
    return None if factor is None else min(sequence, math.ceil(factor * top_k * sequence / experts))


def assign(choice_BSK: jax.Array, real_BS: jax.Array, experts: int, capacity: int | None) -> jax.Array:
    """The slot of each token at each of its experts, among those of its device: int32 (B, S, K), NOWHERE if none.

    choice_BSK: int32, different experts; real_BS: bool, False for padding, which goes nowhere; both sharded as TOKENS.
    """
    tokens = axes.spec(*TOKENS)

    def body(choice_bsk: jax.Array, real_bs: jax.Array) -> jax.Array:
        b, s, _ = choice_bsk.shape
        wanted_bsE = jnp.any(choice_bsk[..., None] == jnp.arange(experts), axis=2) & real_bs[..., None]
        wanted_bsE = wanted_bsE.astype(jnp.int32)
        before_bsE = jnp.cumsum(wanted_bsE, axis=1) - wanted_bsE
        rank_bsk = jnp.take_along_axis(before_bsE, choice_bsk, axis=2)
        taken_bsk = jnp.broadcast_to(real_bs[..., None], choice_bsk.shape)
        if capacity is not None:
            earlier_bE = _of_earlier_devices(jnp.sum(wanted_bsE, axis=1))
            earlier_bsk = jnp.take_along_axis(jnp.broadcast_to(earlier_bE[:, None], before_bsE.shape), choice_bsk, 2)
            taken_bsk &= earlier_bsk + rank_bsk < capacity
        slot_bsk = jnp.arange(b)[:, None, None] * _slots_of_row(s, capacity) + rank_bsk
        return jnp.where(taken_bsk, slot_bsk, NOWHERE)

    return jax.shard_map(body, in_specs=(tokens, tokens), out_specs=tokens, axis_names=axes.automatic())(
        choice_BSK, real_BS
    )


def to_experts(
    x_BSD: jax.Array, choice_BSK: jax.Array, slot_BSK: jax.Array, experts: int, capacity: int | None
) -> jax.Array:
    """Tokens at their experts: (E, C, D) sharded as AT_EXPERTS; empty slots are zero. Each device sends its own."""
    tokens, at_experts = axes.spec(*TOKENS), axes.spec(*AT_EXPERTS)

    def body(x_bsD: jax.Array, choice_bsk: jax.Array, slot_bsk: jax.Array) -> jax.Array:
        b, s, D = x_bsD.shape
        copies_bskD = jnp.broadcast_to(x_bsD[:, :, None], (*choice_bsk.shape, D))
        empty_EcD = jnp.zeros((experts, b * _slots_of_row(s, capacity), D), x_bsD.dtype)
        blocks_EcD = empty_EcD.at[choice_bsk, slot_bsk].set(copies_bskD, mode="drop", unique_indices=True)
        return _swap(blocks_EcD, split=0, concat=1)

    specs = (tokens, tokens, tokens)
    return jax.shard_map(body, in_specs=specs, out_specs=at_experts, axis_names=axes.automatic())(
        x_BSD, choice_BSK, slot_BSK
    )


def from_experts(y_ECD: jax.Array, choice_BSK: jax.Array, slot_BSK: jax.Array, gates_BSK: jax.Array) -> jax.Array:
    """The way back: (B, S, D), each token's sum over its experts weighted by its gates, added up in float32."""
    tokens, at_experts = axes.spec(*TOKENS), axes.spec(*AT_EXPERTS)

    def body(y_ecD: jax.Array, choice_bsk: jax.Array, slot_bsk: jax.Array, gates_bsk: jax.Array) -> jax.Array:
        blocks_EcD = _swap(y_ecD, split=1, concat=0)
        found_bskD = blocks_EcD.at[choice_bsk, slot_bsk].get(mode="fill", fill_value=0, unique_indices=True)
        total_bsD = jnp.sum(gates_bsk[..., None] * found_bskD.astype(jnp.float32), axis=2)
        return total_bsD.astype(y_ecD.dtype)

    specs = (at_experts, tokens, tokens, tokens)
    return jax.shard_map(body, in_specs=specs, out_specs=tokens, axis_names=axes.automatic())(
        y_ECD, choice_BSK, slot_BSK, gates_BSK
    )


def _swap(blocks: jax.Array, split: int, concat: int) -> jax.Array:
    """Each device of `expert` gets its part of the dim `split` from all, one behind the other along `concat`."""
    if jax.lax.axis_size(EXPERT) == 1:
        return blocks
    return jax.lax.all_to_all(blocks, EXPERT, split_axis=split, concat_axis=concat, tiled=True)


def _slots_of_row(here: int, capacity: int | None) -> int:
    """Slots that a device with `here` tokens of a row needs for them at one expert."""
    return here if capacity is None else min(here, capacity)


def _of_earlier_devices(count_bE: jax.Array) -> jax.Array:
    """How many tokens of a row want each expert on the devices that have earlier parts of that row."""
    parts = jax.lax.axis_size(SEQUENCE)
    if parts == 1:
        return jnp.zeros_like(count_bE)
    counts_PbE = jax.lax.all_gather(count_bE, SEQUENCE)
    is_earlier_P = jnp.arange(parts) < jax.lax.axis_index(SEQUENCE)
    return jnp.sum(jnp.where(is_earlier_P[:, None, None], counts_PbE, 0), axis=0)
