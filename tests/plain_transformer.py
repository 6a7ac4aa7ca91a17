"""The transformer written down once more from the papers, in plain jnp on one device: what gradients are compared with.

No sharding, no scan over layers, no chunks, no kernel and no gradient rule of its own: autodiff does all of it, in the
dtype of the weights (float64 inside `float64_gradients`). The frequencies of the rotary positions are
`layers.rope.frequencies`, which `layers/test_rope.py` compares with the papers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.layers.rope import attention_factor, frequencies


def plain_sums(model, flat, batch, z_loss=0.0):
    """(loss + z-loss, {"loss", "z_loss"}), sums over the tokens of a batch weighted by `loss_weight`.

    model: a TransformerConfig; flat: path -> weights; batch: NumPy arrays as a task's loss takes them.
    """
    x = flat["embed/table"][batch["tokens"]]
    for layer in range(model.layers):
        w = {path.removeprefix("layers/"): leaf[layer] for path, leaf in flat.items() if path.startswith("layers/")}
        window = model.window[layer % len(model.window)] if model.window else 0
        x = x + _attention(model, w, _norm(x, w["attention_norm/scale"], model), batch, window)
        h = _norm(x, w["mlp_norm/scale"], model)
        gate = h @ w["mlp/gate"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (h @ w["mlp/up"])) @ w["mlp/down"]
    logits = _norm(x, flat["norm/scale"], model) @ (flat["embed/table"].T if model.tied else flat["head/weight"])
    logits = _cap(logits, model.logit_softcap)
    log_z = jnp.log(jnp.exp(logits).sum(-1))
    token_loss = log_z - jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    weight = jnp.asarray(batch["loss_weight"], logits.dtype)
    sums = {"loss": (weight * token_loss).sum(), "z_loss": z_loss * (weight * log_z**2).sum()}
    return sums["loss"] + sums["z_loss"], sums


def float64_gradients(model, flat, batch, z_loss=0.0):
    """(gradients by path, metrics) of the mean over the batch's tokens, computed in float64: NumPy arrays."""
    with jax.enable_x64(True):
        wide = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
        return jax.tree.map(np.asarray, _program(model, z_loss)(wide, batch))


@functools.cache
def _program(model, z_loss):
    def mean(flat, batch):
        total, sums = plain_sums(model, flat, batch, z_loss)
        weight = jnp.asarray(batch["loss_weight"], total.dtype).sum()
        return total / weight, {name: value / weight for name, value in sums.items()}

    return jax.jit(jax.grad(mean, has_aux=True))


def _attention(model, w, h, batch, window):
    q, k, v = (jnp.einsum("bsd,dhk->bshk", h, w[f"attention/{name}"]) for name in "qkv")
    if model.qk_norm:
        q, k = _norm(q, w["attention/q_norm"], model), _norm(k, w["attention/k_norm"], model)
    q, k = _rotate(q, batch["positions"], model), _rotate(k, batch["positions"], model)
    k, v = (jnp.repeat(x, model.heads // model.key_heads, axis=2) for x in (k, v))
    scores = _cap(jnp.einsum("bshk,bthk->bhst", q, k) / np.sqrt(model.dim_per_head), model.attention_softcap)
    back = np.arange(h.shape[1])[:, None] - np.arange(h.shape[1])[None]
    seen = (back >= 0) & (back < (window or h.shape[1]))
    seen = seen & (batch["segment_ids"][:, :, None] == batch["segment_ids"][:, None, :])
    weights = jnp.where(seen[:, None], jnp.exp(scores), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bhst,bthk,hkd->bsd", weights, v, w["attention/o"])


def _norm(x, scale, model):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + model.norm_epsilon) * scale


def _cap(x, cap):
    return cap * jnp.tanh(x / cap) if cap else x


def _rotate(x, positions, model):
    angle = positions[..., None] * np.asarray(frequencies(model.rope, x.shape[-1]), np.float64)
    factor = attention_factor(model.rope)
    cos, sin = (factor * f(angle)[:, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
