"""Small models, meshes and prompts of the generation tests."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.config import Config, MeshConfig, PrecisionConfig, RematConfig
from jaxscale.mesh import make_mesh
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.models.rope_config import RopeConfig
from jaxscale.models.transformer_config import TransformerConfig

VOCABULARY = 264
SMALL = {"vocabulary": VOCABULARY, "layers": 4, "width": 32, "heads": 4, "mlp": 48, "attention": "xla"}

MODELS = {
    "plain": TransformerConfig(**SMALL),
    "grouped": TransformerConfig(**SMALL, kv_heads=2, head_dim=16, rope=RopeConfig(scaling="yarn", factor=4.0)),
    "window": TransformerConfig(**SMALL, window=(3, 0)),
    "softcap": TransformerConfig(**SMALL, logit_softcap=2.0, attention_softcap=0.5),
    "qk_norm_tied": TransformerConfig(**SMALL, qk_norm=True, tied=True),
    "experts": TransformerConfig(**SMALL, experts=ExpertsConfig(count=8, shared=1, bias_step=1e-3, capacity=8.0)),
    "all": TransformerConfig(
        **{**SMALL, "heads": 8}, kv_heads=4, head_dim=8, window=(5, 0), logit_softcap=3.0, attention_softcap=1.0,
        qk_norm=True, tied=True, dropout=0.5,
    ),
}  # fmt: skip

MESHES = {
    "one": {},
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "tensor4": {"tensor": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"context": 2, "tensor": 2},
}


def config_of(model, **changes):
    fields = {"precision": PrecisionConfig(compute="float32"), "remat": RematConfig(policy="none")}
    return Config(name="generation", model=model, **(fields | changes))


def mesh_of(sizes):
    """A mesh over the first devices that the sizes need."""
    count = int(np.prod(list(sizes.values()), dtype=int))
    mesh = MeshConfig(**{"fsdp": 1, **sizes})
    return make_mesh(config_of(MODELS["plain"], devices=count, mesh=mesh))


def make_params(task, spread=1.0):
    """Parameters on the current mesh; norm scales and the head differ from position to position, unlike fresh ones.

    `spread` scales the head, so that the drawn tokens depend on what is before them and not on the noise alone.
    """

    def init():
        params = task.init(jax.random.key(0))

        def stir(path, x):
            if "norm" in jax.tree_util.keystr(path):
                return x * (1 + 0.3 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))
            return x

        params = jax.tree_util.tree_map_with_path(stir, params)
        name = ("embed", "table") if task.model.tied else ("head", "weight")
        params[name[0]][name[1]] *= spread
        return params

    return jax.jit(init)()


def full_logits(task, params, tokens):
    """Logits (B, S, V) at every position by the training forward pass, the head applied in NumPy."""
    rows, length = tokens.shape
    spec = jax.P(("data", "fsdp", "expert"), "context")
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
    }
    batch = {
        name: jax.device_put(value, jax.NamedSharding(jax.sharding.get_mesh(), spec)) for name, value in batch.items()
    }
    batch["row"] = jnp.arange(rows, dtype=jnp.uint32)
    batch["loss_weight"] = jax.device_put(
        np.ones(tokens.shape, np.float32), jax.NamedSharding(jax.sharding.get_mesh(), spec)
    )
    hidden = np.asarray(jax.jit(lambda p, b: task.hidden(p, b, None))(params, batch), np.float64)
    head = np.asarray(task.head(params), np.float64)
    logits = hidden @ (head.T if task.model.tied else head)
    cap = task.model.logit_softcap
    return cap * np.tanh(logits / cap) if cap else logits
