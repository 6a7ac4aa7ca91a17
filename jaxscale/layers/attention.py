"""Grouped-query attention layer: projections, optional QK-norm, rotary positions; the attention itself is passed in.

Legend: B batch rows, S sequence, D width, H query heads, G key/value heads, K head dim.
Training passes `ops.attention.attention`, generation one that reads and writes its cache: the rest is the same code.
Read next: `layers/mlp.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxscale import axes
from jaxscale.layers.linear import column, project, row
from jaxscale.layers.norm import rms_norm
from jaxscale.layers.rope import rotate
from jaxscale.precision import Precision
from jaxscale.task import Parameter

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q_BSHK, k_BSGK, v_BSGK) -> out_BSHK, positions split over `context`; what gathers them is inside."""

RopeTables = tuple[jax.Array, jax.Array]
"""Cosines and sines of `rope.rope_tables`, computed once for all layers."""


def attention_parameters(
    width: int, heads: int, kv_heads: int, head_dim: int, layers: int, qk_norm: bool
) -> dict[str, Parameter]:
    """q: (D, H, K); k, v: (D, G, K); o: (H, K, D). Ainslie et al. 2023, "GQA"; QK-norm: Henry et al. 2020."""
    query = Parameter((width, heads, head_dim), ("embed", "heads", "head_dim"), scale=width**-0.5, matrix_dims=(1, 2))
    key = Parameter(
        (width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"), scale=width**-0.5, matrix_dims=(1, 2)
    )
    out_scale = (heads * head_dim * 2 * layers) ** -0.5
    out = Parameter((heads, head_dim, width), ("heads", "head_dim", "embed"), scale=out_scale, matrix_dims=(2, 1))
    table = {"q": query, "k": key, "v": key, "o": out}
    if qk_norm:
        table |= {name: Parameter((head_dim,), ("norm",), init="ones") for name in ("q_norm", "k_norm")}
    return table


def attention_layer(
    x_BSD: jax.Array,
    weights: Mapping[str, jax.Array],
    tables: RopeTables,
    attend: Attend,
    norm_epsilon: float,
    precision: Precision,
) -> jax.Array:
    """Attention of x over itself. x and the result are sharded as the residual stream; heads over `tensor`."""
    query_spec = axes.spec("act_batch", "act_sequence", "act_heads", None)
    key_spec = axes.spec("act_batch", "act_sequence", "act_kv_heads", None)
    query = column("BSD,DHK->BSHK", ("embed", "heads", "head_dim"), y=query_spec)
    key = column("BSD,DGK->BSGK", ("embed", "kv_heads", "head_dim"), y=key_spec)
    out = row("BSHK,HKD->BSD", ("heads", "head_dim", "embed"), x=query_spec)

    q_BSHK, k_BSGK, v_BSGK = project((query, key, key), precision, x_BSD, tuple(weights[n] for n in "qkv"))
    if "q_norm" in weights:
        q_BSHK = rms_norm(q_BSHK, weights["q_norm"], norm_epsilon)
        k_BSGK = rms_norm(k_BSGK, weights["k_norm"], norm_epsilon)
    q_BSHK = checkpoint_name(rotate(q_BSHK, tables), "query")
    k_BSGK = checkpoint_name(rotate(k_BSGK, tables), "key")
    v_BSGK = checkpoint_name(v_BSGK, "value")
    mixed_BSHK = checkpoint_name(jax.reshard(attend(q_BSHK, k_BSGK, v_BSGK), query_spec), "attention")
    (y_BSD,) = project((out,), precision, mixed_BSHK, (weights["o"],))
    return checkpoint_name(y_BSD, "attention_output")
