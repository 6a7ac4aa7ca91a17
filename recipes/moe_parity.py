"""A float32 mixture of experts for comparing meshes, schedules and numbers of processes step by step.

    python recipes/moe_parity.py --devices 8 --mesh.expert 4

The sister of `lm_parity`, with 8 experts of which a token goes to 2, a shared one, both ways to balance loads, and the
router's z-loss. `scripts/bench/parallel.py --rows parity --recipe moe_parity` compares all meshes and schedules, at the
same number of microbatches (the balance loss is one of microbatches).
"""

from jaxscale.config import Config, DataConfig, OptimConfig, PrecisionConfig, RematConfig
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import run


def config() -> Config:
    return Config(
        name="moe_parity",
        model=TransformerConfig(
            vocabulary=512,
            layers=8,
            width=64,
            heads=8,
            kv_heads=4,
            mlp=64,
            experts=ExpertsConfig(count=8, shared=1, balance_loss=0.01, bias_step=1e-3, z_loss=1e-3),
        ),
        steps=20,
        data=DataConfig(path="builtin", sequence=64, batch=32),
        optim=OptimConfig(name="adamw", learning_rate=1e-3, schedule="constant", warmup=0),
        precision=PrecisionConfig(compute="float32", weights="float32", reduce="float32"),
        remat=RematConfig(policy="none"),
    )


if __name__ == "__main__":
    run(__file__)
