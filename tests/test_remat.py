"""Each policy keeps for the backward pass what its name says: the residuals of a whole model, layer by layer."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from jaxscale import axes
from jaxscale.config import Config, PrecisionConfig, RematConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.remat import ACTIVATIONS

B, S, D, H, G, K, F, L = 2, 24, 32, 8, 2, 8, 40, 3
MODEL = TransformerConfig(vocabulary=48, layers=L, width=D, heads=H, kv_heads=G, head_dim=K, mlp=F)
SHAPES = {
    "input": (B, S, D),
    "query": (B, S, H, K),
    "key": (B, S, G, K),
    "value": (B, S, G, K),
    "attention": (B, S, H, K),
    "attention_output": (B, S, D),
    "gate": (B, S, F),
    "up": (B, S, F),
    "mlp": (B, S, F),
}
"""Activations of one layer; `input` is the residual stream before it."""


def kept(policy, names=("attention", "mlp")):
    """(shape in one layer, "host" or "device") of what the layers leave for their backward pass -> how many of them."""
    config = Config("r", MODEL, remat=RematConfig(policy, names), precision=PrecisionConfig(compute="float32"))
    with jax.set_mesh(jax.make_mesh((1,) * 6, axes.AXES, devices=jax.devices()[:1])):
        task = MODEL.task(config)
        params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
        batch = {name: jax.ShapeDtypeStruct((B, S), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
        batch["row"] = jax.ShapeDtypeStruct((B,), jnp.uint32)
        program = jax.make_jaxpr(lambda p, b: jax.vjp(lambda p: task.hidden(p, b, None), p)[1])(params, batch)
    activations = [aval for aval in program.out_avals if aval.shape[:3] == (L, B, S)]
    return Counter(
        (aval.shape[1:], "host" if aval.memory_space == jax.memory.Space.Host else "device") for aval in activations
    )


def on_device(*names):
    return Counter((SHAPES[name], "device") for name in names)


def test_full_keeps_the_layers_input():
    assert kept("full") == on_device("input")


def test_dots_keeps_the_results_of_the_products_with_weights():
    """But that of the last product of a layer, which the backward pass does not need; and no scores of attention."""
    products = on_device("query", "key", "value", "attention_output", "gate", "up")
    assert kept("dots") == on_device("input") + products


@pytest.mark.parametrize("names", [("attention", "mlp"), ("query",), ("key", "value", "attention_output")], ids=str)
def test_names_keeps_what_is_named(names):
    assert kept("names", names) == on_device("input", *names)


def test_offload_keeps_what_is_named_on_the_host():
    assert kept("offload") == on_device("input") + Counter([(SHAPES[n], "host") for n in ("attention", "mlp")])
    assert kept("offload", ()) == on_device("input")


def test_none_keeps_more_than_any_other():
    for policy in ("full", "dots", "names"):
        assert kept("none").total() > 2 * kept(policy).total(), policy


def test_every_name_that_may_be_asked_for_is_one_of_the_model():
    """But `mlp_output`, which the backward pass does not need: it is part of the next layer's input."""
    for name in ACTIVATIONS:
        assert kept("names", (name,)) - on_device("input") == (on_device(name) if name in SHAPES else Counter()), name
