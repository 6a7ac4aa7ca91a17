"""Rematerialisation by name: what a layer keeps for its backward pass and what it computes again.

    none     keep everything XLA wants to keep
    full     keep only the layer's input (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost")
    dots     keep the results of matrix products that have no batch dim in their weights, recompute the rest
    names    keep the activations named in `remat.names`, see ACTIVATIONS
    offload  move those to host memory and fetch them back

With `full` and `names`, `remat.offload` moves other activations to host memory; `layer_input` is what `full` keeps.

Read next: `models/transformer.py`, which names its activations.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxscale.config import ConfigError, RematConfig

ACTIVATIONS = (
    "attention",
    "mlp",
    "query",
    "key",
    "value",
    "attention_output",
    "mlp_output",
    "dispatched",
    "layer_input",
)
"""Names that models give to activations with `jax.ad_checkpoint.checkpoint_name`."""


def check(config: RematConfig) -> None:
    """Raises ConfigError on the name of an activation that no model has."""
    for field, names in (("names", config.names), ("offload", config.offload)):
        for name in names:
            if name not in ACTIVATIONS:
                raise ConfigError(f"remat.{field} has {name!r}; activations are named {', '.join(ACTIVATIONS)}")


def apply[**A, R](config: RematConfig, layer: Callable[A, R]) -> Callable[A, R]:
    """`layer` with the policy applied."""
    policies = jax.checkpoint_policies
    if config.offload or config.policy == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(config.names) if config.policy == "names" else [],
            names_which_can_be_offloaded=list(config.names if config.policy == "offload" else config.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(layer, policy=policy)
    match config.policy:
        case "none":
            return layer
        case "full":
            return jax.checkpoint(layer, policy=policies.nothing_saveable)
        case "dots":
            return jax.checkpoint(layer, policy=policies.dots_with_no_batch_dims_saveable)
        case "names":
            return jax.checkpoint(layer, policy=policies.save_only_these_names(*config.names))
        case _:
            raise AssertionError(config.policy)
