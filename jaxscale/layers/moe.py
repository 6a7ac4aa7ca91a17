"""Mixture of experts in place of the MLP: route, send, each expert's gated MLP, send back (Shazeer et al. 2017).

    router/weight (D, E)   router/bias (E,)   experts/gate, up (E, D, F)   experts/down (E, F, D)   shared/<as the MLP>

Experts are split over the mesh axis `expert`, each expert's weights over `fsdp` and `tensor` as those of a dense MLP.
Read next: `models/transformer.py`.

Legend: B rows, S sequence, D width, F hidden units of an expert, E experts, K experts of a token, C slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxscale import axes
from jaxscale.layers.linear import Projection, project
from jaxscale.layers.mlp import mlp, mlp_parameters
from jaxscale.layers.router import layer_sums, route, router_parameters
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.parallel import ragged
from jaxscale.parallel.expert import AT_EXPERTS, NOWHERE, TOKENS, assign, from_experts, row_capacity, to_experts
from jaxscale.precision import Precision
from jaxscale.task import NOTHING, LayerSums, Parameter

IN = ("experts", "embed", "mlp")
OUT = ("experts", "mlp", "embed")


class Tokens(NamedTuple):
    """What is known of the tokens of a training batch, sharded as TOKENS; generation knows nothing of it."""

    real_BS: jax.Array
    """bool: False for padding."""
    weight_BS: jax.Array
    """float32: how much each counts."""


def tokens_of(segment_ids_BS: jax.Array, loss_weight_BS: jax.Array) -> Tokens:
    """Tokens of segment 0 are padding."""
    spec = axes.spec(*TOKENS)
    return Tokens(jax.reshard(segment_ids_BS, spec) > 0, jax.reshard(loss_weight_BS, spec))


def moe_parameters(width: int, hidden: int, layers: int, experts: ExpertsConfig) -> dict[str, dict[str, Parameter]]:
    """By block. Deviations as in a dense MLP of one expert's size."""
    one = mlp_parameters(width, hidden, layers)
    own = {
        name: Parameter((experts.count, *p.shape), ("experts", *p.axes), scale=p.scale, matrix_dims=p.matrix_dims)
        for name, p in one.items()
    }
    table = {"router": router_parameters(width, experts), "experts": own}
    if experts.shared:
        table["shared"] = mlp_parameters(width, experts.shared * hidden, layers)
    return table


def moe(
    x_BSD: jax.Array,
    weights: Mapping[str, Mapping[str, jax.Array]],
    experts: ExpertsConfig,
    precision: Precision,
    tokens: Tokens | None,
    layers: int,
) -> tuple[jax.Array, LayerSums]:
    """The experts' update of the residual stream, sharded as it is, and this layer's losses and metrics.

    tokens: None in generation, where every token is real, nothing is counted, and no expert has a limit, since a limit
    would make a token depend on which others are computed with it. layers: of the whole model.
    """
    routes = route(x_BSD, weights["router"], experts, precision)
    real_BS = tokens.real_BS if tokens else jnp.ones_like(routes.square_BS, bool)
    capacity = row_capacity(experts.capacity, x_BSD.shape[1], experts.top_k, experts.count) if tokens else None
    choice_BSK, gates_BSK, dropped_BS = routes.choice_BSK, routes.gates_BSK, None
    if capacity is None and (experts.dispatch == "ragged" or (experts.dispatch == "auto" and ragged.native())):
        at_RD, expert_R = ragged.to_experts(x_BSD, choice_BSK, real_BS, experts.count)
        at_RD = ragged.each_expert(precision, checkpoint_name(at_RD, "dispatched"), expert_R, weights["experts"])
        y_BSD = ragged.from_experts(at_RD, choice_BSK, real_BS, gates_BSK, experts.count)
    else:
        slot_BSK = assign(choice_BSK, real_BS, experts.count, capacity)
        at_ECD = to_experts(x_BSD, choice_BSK, slot_BSK, experts.count, capacity)
        at_ECD = _each_expert(checkpoint_name(at_ECD, "dispatched"), weights["experts"], precision)
        y_BSD = from_experts(at_ECD, choice_BSK, slot_BSK, gates_BSK)
        if capacity is not None:
            dropped_BS = jnp.sum((slot_BSK == NOWHERE) & real_BS[..., None], axis=-1)
    if "shared" in weights:
        y_BSD = y_BSD + mlp(x_BSD, weights["shared"], precision)
    y_BSD = checkpoint_name(y_BSD, "mlp_output")
    if tokens is None:
        return y_BSD, NOTHING
    return y_BSD, layer_sums(routes, dropped_BS, tokens.weight_BS, experts, layers)


def _each_expert(x_ECD: jax.Array, weights: Mapping[str, jax.Array], precision: Precision) -> jax.Array:
    """down(silu(gate(x)) * up(x)) of each expert. x and the result: (E, C, D) sharded as AT_EXPERTS."""
    whole = axes.spec("act_experts", "act_slots", "act_embed")
    hidden = axes.spec("act_experts", "act_slots", "act_mlp")
    inward = Projection("ECD,EDF->ECF", IN, x=whole, y=hidden, out=hidden)
    outward = Projection("ECF,EFD->ECD", OUT, x=hidden, y=whole, out=axes.spec(*AT_EXPERTS))
    gate_ECF, up_ECF = project((inward, inward), precision, x_ECD, (weights["gate"], weights["up"]))
    hidden_ECF = checkpoint_name(jax.nn.silu(gate_ECF) * up_ECF, "mlp")
    (y_ECD,) = project((outward,), precision, hidden_ECF, (weights["down"],))
    return y_ECD
