"""The transformer against a plain float64 one written here from the papers, and packing, dropout and FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes, tree
from jaxscale.config import Config, ConfigError, PrecisionConfig, RematConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.testing.flops import matmul_flops

BASE = TransformerConfig(vocabulary=48, layers=4, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48)
VARIANTS = {
    "grouped": BASE,
    "qk norm, tied": dataclasses.replace(BASE, qk_norm=True, tied=True),
    "windows": dataclasses.replace(BASE, window=(4, 0)),
    "soft-caps": dataclasses.replace(BASE, attention_softcap=2.0, logit_softcap=3.0),
}
ROWS, LENGTH = 4, 24


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(jax.make_mesh((1,) * 6, axes.AXES, devices=jax.devices()[:1])):
        yield


def task_of(model, remat="none"):
    config = Config("t", model, precision=PrecisionConfig(compute="float32"), remat=RematConfig(remat))
    return model.task(config)


def put(host):
    return {name: jax.device_put(v, axes.sharding(("act_batch", "act_sequence")[: v.ndim])) for name, v in host.items()}


def batch_of(documents=1):
    return put(host_batch(documents))


def host_batch(documents=1):
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 48, (ROWS, LENGTH + 1)).astype(np.int32)
    position = np.arange(LENGTH) % (LENGTH // documents)
    segment = 1 + np.arange(LENGTH) // (LENGTH // documents)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.tile(segment, (ROWS, 1)).astype(np.int32),
        "positions": np.tile(position, (ROWS, 1)).astype(np.int32),
        "loss_weight": np.ones((ROWS, LENGTH), np.float32),
        "row": np.arange(ROWS, dtype=np.uint32),
    }


def norm(x, scale, epsilon=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rotate(x, positions, theta=10000.0):
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_loss(model, flat, tokens, targets, positions):
    """Sum of the losses of one document, in float64, position by position and head by head."""
    x = flat["embed/table"][tokens]
    group = model.heads // model.key_heads
    for layer in range(model.layers):
        w = {path: value[layer] for path, value in flat.items() if path.startswith("layers/")}
        h = norm(x, w["layers/attention_norm/scale"])
        q, k, v = (np.einsum("sd,dhk->shk", h, w[f"layers/attention/{n}"]) for n in "qkv")
        if model.qk_norm:
            q, k = norm(q, w["layers/attention/q_norm"]), norm(k, w["layers/attention/k_norm"])
        q, k = rotate(q, positions), rotate(k, positions)
        window = (model.window or (0,))[layer % len(model.window or (0,))] or len(tokens)
        mixed = np.zeros_like(q)
        for head in range(model.heads):
            for t in range(len(tokens)):
                seen = slice(max(0, t - window + 1), t + 1)
                scores = k[seen, head // group] @ q[t, head] / np.sqrt(model.dim_per_head)
                if model.attention_softcap:
                    scores = model.attention_softcap * np.tanh(scores / model.attention_softcap)
                mixed[t, head] = softmax(scores) @ v[seen, head // group]
        x = x + np.einsum("shk,hkd->sd", mixed, w["layers/attention/o"])
        h = norm(x, w["layers/mlp_norm/scale"])
        gate = h @ w["layers/mlp/gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["layers/mlp/up"])) @ w["layers/mlp/down"]
    x = norm(x, flat["norm/scale"])
    logits = x @ (flat["embed/table"].T if model.tied else flat["head/weight"])
    if model.logit_softcap:
        logits = model.logit_softcap * np.tanh(logits / model.logit_softcap)
    return -np.log(softmax(logits)[np.arange(len(tokens)), targets]).sum()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("documents", [1, 3])
def test_loss_equals_a_plain_implementation(name, documents):
    """With three documents in a row the reference sees each alone: packing changes nothing."""
    model = VARIANTS[name]
    task = task_of(model)
    params = task.init(jax.random.key(0))
    # Norm scales start at 1, which would hide a missing one.
    params["norm"]["scale"] = params["norm"]["scale"] * 1.3
    params["layers"]["mlp_norm"]["scale"] = params["layers"]["mlp_norm"]["scale"] * 0.7
    flat = {path: np.asarray(value, np.float64) for path, value in tree.flatten(params).items()}
    batch = batch_of(documents)
    total, sums = jax.jit(task.loss)(params, batch, None)
    expected, size = 0.0, LENGTH // documents
    for row in range(ROWS):
        for start in range(0, LENGTH, size):
            part = slice(start, start + size)
            tokens, targets = (np.asarray(batch[n])[row, part] for n in ("tokens", "targets"))
            expected += reference_loss(model, flat, tokens, targets, np.arange(size))
    np.testing.assert_allclose(float(total), expected, rtol=2e-6)
    np.testing.assert_allclose(float(sums["loss"]), expected, rtol=2e-6)


def test_dropout_depends_on_step_and_row_only():
    task = task_of(dataclasses.replace(BASE, dropout=0.5))
    params = task.init(jax.random.key(0))
    host = host_batch()
    host["loss_weight"][1:] = 0
    one, moved = put(host), put({name: np.roll(value, 2, axis=0) for name, value in host.items()})
    program = jax.jit(lambda batch, key: task.loss(params, batch, key)[0])

    def loss(batch, key):
        return float(program(batch, key))

    key = jax.random.key(1)
    assert loss(one, key) == pytest.approx(loss(moved, key), rel=1e-6)
    assert loss(one, key) != loss(one, jax.random.key(2))
    other_row = put({**host, "row": host["row"] + 100})
    assert loss(one, key) != loss(other_row, key)
    without = jax.jit(lambda batch: task.loss(params, batch, None)[0])
    assert float(without(one)) == float(jax.jit(lambda batch: task_of(BASE).loss(params, batch, None)[0])(one))


def test_flops_formula_counts_the_matmuls_of_the_program():
    """Forward and backward have the formula's matmul FLOPs, attention counted without its causal half."""
    model = TransformerConfig(vocabulary=512, layers=4, width=128, heads=4, mlp=256, attention="xla")
    task = task_of(model)
    rows, length = 2, 64
    batch = {name: v[:1, :1] for name, v in batch_of().items() if name != "row"}
    batch = {name: jnp.zeros((rows, length), v.dtype) for name, v in batch.items()} | {
        "row": jnp.zeros(rows, jnp.uint32)
    }
    params = task.init(jax.random.key(0))
    program = jax.make_jaxpr(jax.grad(lambda p: task.loss(p, batch, None)[0]))(params)
    counted = matmul_flops(program)
    formula = task.flops_per_token(length) * rows * length
    attention = 12 * model.heads * model.dim_per_head * (length + 1) / 2 * model.layers * rows * length
    # The XLA kernel computes between the causal half and the full square of the scores.
    assert formula * 0.99 <= counted <= (formula + attention) * 1.01


def test_windows_attend_to_fewer_positions():
    narrow = dataclasses.replace(BASE, window=(4,))
    every = 12 * BASE.heads * BASE.dim_per_head * BASE.layers
    expected = (1 + 2 + 3 + 4 * (LENGTH - 3)) / LENGTH
    difference = task_of(BASE).flops_per_token(LENGTH) - task_of(narrow).flops_per_token(LENGTH)
    assert difference == pytest.approx(every * ((LENGTH + 1) / 2 - expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 30, "head_dim": 0}, "model.width 30 is not a multiple of model.heads 4"),
        ({"kv_heads": 3}, "model.heads 4 is not a multiple of model.kv-heads 3"),
        ({"head_dim": 7}, "the head dim is 7; rotary positions need an even one"),
        ({"window": (4, 0, 0)}, "model.window has 3 entries, which do not divide model.layers 4"),
        ({"window": (-1,)}, "use positive sizes"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"layers": 0}, "model.layers is 0"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **change)


def test_unknown_activation_name():
    with pytest.raises(ConfigError, match="activations are named attention, mlp"):
        BASE.task(Config("t", BASE, remat=RematConfig("names", ("attentoin",))))
