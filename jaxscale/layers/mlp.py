"""Gated MLP (SwiGLU: Shazeer 2020, "GLU Variants Improve Transformer"). Legend: B rows, S sequence, D width, F hidden.

Read next: `models/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxscale import axes
from jaxscale.layers.linear import column, project, row
from jaxscale.precision import Precision
from jaxscale.task import Parameter


def mlp_parameters(width: int, hidden: int, layers: int) -> dict[str, Parameter]:
    """gate, up: (D, F) with axes (embed, mlp); down: (F, D). Deviations: 1/sqrt(inputs), down also over sqrt(2L)."""
    inward = Parameter((width, hidden), ("embed", "mlp"), scale=width**-0.5, matrix_dims=(1, 1))
    outward = Parameter((hidden, width), ("mlp", "embed"), scale=(hidden * 2 * layers) ** -0.5, matrix_dims=(1, 1))
    return {"gate": inward, "up": inward, "down": outward}


def mlp(x_BSD: jax.Array, weights: Mapping[str, jax.Array], precision: Precision) -> jax.Array:
    """down(silu(gate(x)) * up(x)). x and the result are sharded as the residual stream; hidden units over `tensor`."""
    hidden = axes.spec("act_batch", "act_sequence", "act_mlp")
    inward = column("BSD,DF->BSF", ("embed", "mlp"), y=hidden)
    outward = row("BSF,FD->BSD", ("mlp", "embed"), x=hidden)
    gate_BSF, up_BSF = project((inward, inward), precision, x_BSD, (weights["gate"], weights["up"]))
    hidden_BSF = checkpoint_name(jax.nn.silu(gate_BSF) * up_BSF, "mlp")
    (y_BSD,) = project((outward,), precision, hidden_BSF, (weights["down"],))
    return checkpoint_name(y_BSD, "mlp_output")
