"""Mixtral 8x7B's shape from scratch on one TPU slice: 46.7 B parameters of which a token uses 12.9 B, rows of 8,192.

    python recipes/moe_8x7b.py --on v5p-512 --data.path gs://BUCKET/tokens --run.dir gs-mounted/moe_8x7b

Each of the 8 experts of a layer is on 32 devices (fsdp 32 x expert 8), nothing is dropped, and loads are kept alike by
the balance loss with the weight of Mixtral's authors. 240,000 steps are 1.0 T tokens. Not run at full size by the
authors of this file; the tests lower its step on the mesh of the slice.
"""

from jaxscale.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    OptimConfig,
    PrecisionConfig,
    RematConfig,
    TrainConfig,
)
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.models.rope_config import RopeConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import run


def config() -> Config:
    return Config(
        name="moe_8x7b",
        model=TransformerConfig(
            vocabulary=32000,
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            head_dim=128,
            mlp=14336,
            experts=ExpertsConfig(count=8, top_k=2, balance_loss=0.02, z_loss=1e-3),
            rope=RopeConfig(theta=1000000.0),
            norm_epsilon=1e-5,
        ),
        steps=240_000,
        on="v5p-512",
        mesh=MeshConfig(expert=8),
        data=DataConfig(
            path="data/pretraining/*.jsonl.gz",
            tokenizer="data/mixtral/tokenizer.json",
            sequence=8192,
            batch=512,
            held_out_documents=1000,
        ),
        optim=OptimConfig(name="adamw", learning_rate=3e-4, schedule="cosine", warmup=2000, final=0.1),
        # A row on each device at a time: what may come to an expert is room for all rows of 8 devices.
        train=TrainConfig(microbatches=2, z_loss=1e-4),
        precision=PrecisionConfig(compute="bfloat16", weights="float32"),
        remat=RematConfig(policy="full"),
        evaluate=EvaluateConfig(every=1000, batches=16),
        checkpoint=CheckpointConfig(every=500),
    )


if __name__ == "__main__":
    run(__file__)
