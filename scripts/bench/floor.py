"""The floor: one training step of `lm_tiny`, hand-written in one file without the framework.

    python scripts/bench/floor.py [--steps 20] [--cache DIR]

Same model, remat, segment mask, global-token mean, clipping, AdamW and select of non-finite updates, on 8 emulated
devices with every weight sharded 8 ways. Prints one JSON line: the time of day at the end of the first step, each
step's seconds, peak memory of the process. `scripts/bench/training.py` runs it beside the framework.
"""

import argparse
import functools
import json
import os
import resource
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

LAYERS, WIDTH, HEADS, HEAD, HIDDEN, VOCABULARY, BATCH, SEQUENCE = 4, 256, 4, 64, 1024, 512, 8, 256
COMPUTE = jnp.bfloat16
SHAPES = {
    "table": ((VOCABULARY, WIDTH), P(None, "fsdp")),
    "head": ((WIDTH, VOCABULARY), P("fsdp")),
    "norm": ((WIDTH,), P()),
    "norm_1": ((LAYERS, WIDTH), P()),
    "norm_2": ((LAYERS, WIDTH), P()),
    "q": ((LAYERS, WIDTH, HEADS, HEAD), P(None, "fsdp")),
    "k": ((LAYERS, WIDTH, HEADS, HEAD), P(None, "fsdp")),
    "v": ((LAYERS, WIDTH, HEADS, HEAD), P(None, "fsdp")),
    "o": ((LAYERS, HEADS, HEAD, WIDTH), P(None, None, None, "fsdp")),
    "gate": ((LAYERS, WIDTH, HIDDEN), P(None, "fsdp")),
    "up": ((LAYERS, WIDTH, HIDDEN), P(None, "fsdp")),
    "down": ((LAYERS, HIDDEN, WIDTH), P(None, None, "fsdp")),
}


def rms(x, scale):
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-5) * scale).astype(x.dtype)


def rope(x, positions):
    angle = positions[..., None] * 10000.0 ** (-jnp.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def loss_fn(params, batch, rows):
    pin = functools.partial(jax.lax.with_sharding_constraint, shardings=rows)
    low = jax.tree.map(lambda w: w.astype(COMPUTE), params)
    mask = batch["segment_ids"][:, None, :, None] == batch["segment_ids"][:, None, None, :]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(x, w):
        h = rms(x, w["norm_1"])
        q, k, v = (jnp.einsum("bsd,dhk->bshk", h, w[n]) for n in "qkv")
        q, k = rope(q, batch["positions"]), rope(k, batch["positions"])
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
        x = pin(x + jnp.einsum("bshk,hkd->bsd", mixed, w["o"]))
        h = rms(x, w["norm_2"])
        return pin(x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]), None

    stacked = {name: low[name] for name in ("q", "k", "v", "o", "gate", "up", "down", "norm_1", "norm_2")}
    x, _ = jax.lax.scan(layer, pin(low["table"][batch["tokens"]]), stacked)
    logits = (rms(x, low["norm"]) @ low["head"]).astype(jnp.float32)
    target = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    weight = batch["loss_weight"]
    return jnp.sum((jax.nn.logsumexp(logits, -1) - target) * weight) / jnp.sum(weight)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cache", default="")
    options = parser.parse_args()
    # Without it emulated devices stand now and then (scripts/bench/emulated_devices.py).
    flags, flag = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_enable_concurrency_optimized_scheduler"
    os.environ["XLA_FLAGS"] = flags if flag in flags else f"{flags} {flag}=false".strip()
    jax.config.update("jax_num_cpu_devices", 8)
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", options.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in SHAPES.items()}
    rows = NamedSharding(mesh, P("fsdp"))
    decay = {name: not name.startswith("norm") for name in SHAPES}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, 0.9, 0.95, weight_decay=0.1, mask=decay))

    def init(key):
        def normal(name, shape):
            return jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape) * 0.02

        params = {n: jnp.ones(s) if n.startswith("norm") else normal(n, s) for n, (s, _) in SHAPES.items()}
        return params, optimizer.init(params)

    abstract = jax.eval_shape(init, jax.random.key(0))
    placed = jax.tree_util.tree_map_with_path(
        lambda path, _: next((shardings[k.key] for k in path if hasattr(k, "key")), NamedSharding(mesh, P())), abstract
    )
    params, opt_state = jax.jit(init, out_shardings=placed)(jax.random.key(0))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, rows)
        norm = optax.global_norm(grads)
        updates, new_state = optimizer.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_state)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        return *jax.tree.map(functools.partial(jnp.where, ok), new, (params, opt_state)), loss, norm

    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 256, (BATCH, SEQUENCE + 1)).astype(np.int32)
    ones = np.ones((BATCH, SEQUENCE), np.int32)
    host = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": ones,
        "loss_weight": ones * np.float32(1),
    }
    host["positions"] = np.broadcast_to(np.arange(SEQUENCE, dtype=np.int32), (BATCH, SEQUENCE))
    seconds, first = [], 0.0
    pending, mark = None, time.monotonic()
    for number in range(options.steps + 1):  # a step's loss is fetched when the next one is under way
        if number < options.steps:
            params, opt_state, loss, _ = step(params, opt_state, jax.device_put(host, rows))
        if pending is not None:
            pending.block_until_ready()
            now = time.monotonic()
            seconds.append(now - mark)
            mark, first = now, first or time.time()
        pending = loss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"first_step_at": first, "step_seconds": seconds, "peak_bytes": peak, "loss": float(loss)}))


if __name__ == "__main__":
    main()
