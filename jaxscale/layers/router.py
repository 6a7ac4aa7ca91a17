"""Which experts a token goes to and with which gates, and what keeps the experts' loads alike.

Scores are computed in float32 by the device that has the token, with the whole width, so that no mesh adds them up in
another order. Loads are sums over all tokens of a microbatch on all devices, weighted by `loss_weight`, so that balance
does not depend on the mesh and padding counts for nothing. Read next: `moe.py`.

Legend: B rows, S sequence, D width, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscale import axes
from jaxscale.layers.linear import Projection, project
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.precision import Precision
from jaxscale.task import LOAD, PER_LAYER, LayerSums, Parameter

DROPPED = PER_LAYER + "dropped"
"""Metric (layers,): experts that a token was meant for and that had no room, of K."""


class Routes(NamedTuple):
    """Where the tokens of a microbatch go; all but the last are sharded as the residual stream."""

    choice_BSK: jax.Array
    """int32, different experts."""
    gates_BSK: jax.Array
    """float32."""
    chosen_BSE: jax.Array
    """float32: 1 for a token's experts."""
    shares_BSE: jax.Array
    """float32: scores that add up to 1, for the auxiliary loss."""
    square_BS: jax.Array
    """float32: logsumexp of the router's outputs, squared."""
    bias_E: jax.Array | None


def router_parameters(width: int, experts: ExpertsConfig) -> dict[str, Parameter]:
    """weight: (D, E); bias: (E,), which no optimizer trains: each step moves it against its load's error."""
    table = {"weight": Parameter((width, experts.count), ("embed", "router"), scale=width**-0.5)}
    if experts.bias_step:
        table["bias"] = Parameter((experts.count,), ("router",), init="zeros", sign_step=experts.bias_step)
    return table


def route(x_BSD: jax.Array, weights: Mapping[str, jax.Array], experts: ExpertsConfig, reduce: Precision) -> Routes:
    """x: sharded as the residual stream. Ties go to the expert of the lower number."""
    tokens = axes.spec("act_batch", "act_residual_sequence", None)
    exact = Precision(reduce.weights, jnp.float32, reduce.reduce)
    score = Projection("BSD,DE->BSE", ("embed", "router"), x=tokens, y=tokens, out=tokens)
    with jax.default_matmul_precision("highest"):
        (logits_BSE,) = project((score,), exact, x_BSD.astype(jnp.float32), (weights["weight"],))
    soft = experts.score == "softmax"
    scores_BSE = jax.nn.softmax(logits_BSE) if soft else jax.nn.sigmoid(logits_BSE)
    bias_E = weights.get("bias")
    ranked_BSE = scores_BSE if bias_E is None else scores_BSE + jax.lax.stop_gradient(bias_E)
    choice_BSK = _top(jax.lax.stop_gradient(ranked_BSE), experts.top_k)
    is_choice_BSKE = choice_BSK[..., None] == jnp.arange(experts.count)
    gates_BSK = jnp.sum(jnp.where(is_choice_BSKE, scores_BSE[:, :, None], 0), axis=-1)
    if experts.normalise:
        gates_BSK = gates_BSK / (jnp.sum(gates_BSK, axis=-1, keepdims=True) + 1e-20)
    shares_BSE = scores_BSE if soft else scores_BSE / (jnp.sum(scores_BSE, axis=-1, keepdims=True) + 1e-20)
    chosen_BSE = jnp.any(is_choice_BSKE, axis=2).astype(jnp.float32)
    square_BS = jnp.square(jax.nn.logsumexp(logits_BSE, axis=-1))
    return Routes(choice_BSK, experts.scale * gates_BSK, chosen_BSE, shares_BSE, square_BS, bias_E)


def no_sums(experts: ExpertsConfig, layers: int) -> LayerSums:
    """Zeros of the shapes that `layer_sums` has, for so many layers."""
    names = ["balance_loss"] * bool(experts.balance_loss) + ["router_z_loss"] * bool(experts.z_loss)
    metrics = {LOAD: jnp.zeros((layers, experts.count), jnp.float32), **{name: jnp.float32(0) for name in names}}
    if experts.capacity is not None:
        metrics |= {DROPPED: jnp.zeros((layers,), jnp.float32), "dropped": jnp.float32(0)}
    return LayerSums(jnp.float32(0) if names or experts.bias_step else None, metrics)


def layer_sums(
    routes: Routes, dropped_BS: jax.Array | None, weight_BS: jax.Array, experts: ExpertsConfig, layers: int
) -> LayerSums:
    """What this layer adds to the sums of a microbatch.

    dropped_BS: how many of a token's K had no room, where there is a capacity; weight_BS: float32, how much it counts.

    The balance loss is E sum_e f_e P_e of the microbatch, times its weight: f are shares of the load, P mean scores.
    The bias adds a term whose value is zero and whose gradient is the error of the load: a sum over tokens like every
    gradient, so it comes right through microbatches, pipeline stages and devices; the optimizer takes its sign.
    """
    E, K = experts.count, experts.top_k
    alone = [routes.square_BS, jnp.ones_like(routes.square_BS)]
    if dropped_BS is not None:
        alone.append(dropped_BS.astype(jnp.float32))
    columns_BSN = jnp.concatenate([routes.chosen_BSE, routes.shares_BSE, jnp.stack(alone, axis=-1)], axis=-1)
    weight_BS = jax.reshard(weight_BS, axes.spec("act_batch", "act_residual_sequence"))
    # One sum over the devices for all of them.
    sums = jnp.sum(weight_BS[..., None] * columns_BSN, axis=(0, 1))
    load_E, shares_E, square, weight = sums[:E], sums[E : 2 * E], sums[2 * E], sums[2 * E + 1]
    load_E = jax.lax.stop_gradient(load_E)
    metrics, losses = {LOAD: load_E}, []
    if experts.balance_loss:
        losses.append(experts.balance_loss * E / K * jnp.sum(load_E * shares_E) / jnp.maximum(weight, 1e-20))
        metrics["balance_loss"] = losses[-1]
    if experts.z_loss:
        losses.append(experts.z_loss * square)
        metrics["router_z_loss"] = losses[-1]
    if routes.bias_E is not None:
        error_E = load_E - jnp.mean(load_E)
        losses.append(jnp.sum((routes.bias_E - jax.lax.stop_gradient(routes.bias_E)) * error_E))
    if dropped_BS is not None:
        metrics[DROPPED] = sums[2 * E + 2]
        metrics["dropped"] = sums[2 * E + 2] / (K * layers)
    loss = sum(losses[1:], losses[0]) if losses else None
    return LayerSums(loss, {name: jax.lax.stop_gradient(value) for name, value in metrics.items()})


def _top(ranked_BSE: jax.Array, k: int) -> jax.Array:
    """(B, S, K) the experts with the highest scores, in order. Also on a device's own tokens alone."""
    spec = jax.typeof(ranked_BSE).sharding.spec
    top = jax.shard_map(
        lambda ranked: jax.lax.top_k(ranked, k)[1], in_specs=spec, out_specs=spec, axis_names=axes.automatic()
    )
    return top(ranked_BSE)
