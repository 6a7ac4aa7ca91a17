"""Gradients of whole models against autodiff of a plain implementation in float64, on one device and sharded."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from plain_transformer import float64_gradients

from jaxscale import axes, tree
from jaxscale.config import Config, PrecisionConfig, RematConfig, TrainConfig
from jaxscale.models.rope_config import RopeConfig
from jaxscale.models.transformer_config import TransformerConfig

BASE = TransformerConfig(vocabulary=48, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48)
MODELS = {
    "grouped heads": BASE,
    "tied, linear positions": replace(BASE, tied=True, rope=RopeConfig(scaling="linear", factor=4.0)),
    "qk norm, ntk positions": replace(BASE, qk_norm=True, rope=RopeConfig(scaling="ntk", factor=4.0)),
    "windows, llama3 positions": replace(
        BASE, window=(4, 0), rope=RopeConfig(scaling="llama3", factor=8.0, original_length=32)
    ),
    "soft-caps": replace(BASE, attention_softcap=2.0, logit_softcap=3.0),
    "everything, yarn positions": replace(
        BASE, tied=True, qk_norm=True, window=(4, 0), attention_softcap=2.0, logit_softcap=3.0,
        rope=RopeConfig(scaling="yarn", factor=4.0, original_length=64),
    ),
}  # fmt: skip
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
ROWS, LENGTH, DOCUMENT, Z_LOSS = 4, 24, 8, 0.05


def draw_batch():
    """Rows of three documents; a row counts all of its tokens, or all but its first few."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, BASE.vocabulary, (ROWS, LENGTH + 1)).astype(np.int32)
    place = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": 1 + place // DOCUMENT,
        "positions": place % DOCUMENT,
        "loss_weight": (place >= 5 * np.arange(ROWS)[:, None]).astype(np.float32),
        "row": np.arange(ROWS, dtype=np.uint32),
    }


def draw_weights(parameters):
    """As a model starts, but for the norm scales, which differ from 1 and from each other."""
    generator = np.random.default_rng(1)
    return {
        path: generator.normal(size=p.shape, scale=p.scale).astype(np.float32)
        if p.init == "normal"
        else generator.uniform(0.5, 1.5, p.shape).astype(np.float32)
        for path, p in parameters.items()
    }


@pytest.mark.parametrize(("name", "sizes"), [*((name, {}) for name in MODELS), ("everything, yarn positions", MIXED)])
def test_gradients_equal_those_of_a_plain_implementation(name, sizes):
    model, batch = MODELS[name], draw_batch()
    config = Config(
        "gradients", model, precision=PrecisionConfig(compute="float32"), remat=RematConfig("none"),
        train=TrainConfig(z_loss=Z_LOSS, loss_chunk=10),
    )  # fmt: skip
    task = model.task(config)
    flat = draw_weights(task.parameters)
    count = int(np.prod(list(sizes.values()), dtype=int))
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    with jax.set_mesh(jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:count])):
        put = {n: jax.device_put(v, axes.sharding(("act_batch", "act_sequence")[: v.ndim])) for n, v in batch.items()}
        weights = {p: jax.device_put(leaf, axes.sharding(task.parameters[p].axes)) for p, leaf in flat.items()}
        mean = jax.jit(jax.grad(lambda params, batch: task.loss(params, batch, None)[0] / batch["loss_weight"].sum()))
        found = {p: np.asarray(g) for p, g in tree.flatten(mean(tree.unflatten(weights), put)).items()}
    expected, _ = float64_gradients(model, flat, batch, Z_LOSS)
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        assert np.linalg.norm(gradient) > 1e-4, path
        assert np.linalg.norm(found[path] - gradient) <= 1e-5 * np.linalg.norm(gradient), path
