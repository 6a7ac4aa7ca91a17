"""Llama 3.1 70B from scratch on two TPU slices: 70.6 B parameters, rows of 8,192 tokens, 8.4 M tokens a step.

    python recipes/lm_70b.py --on 2x-v5p-256 --data.path gs://BUCKET/tokens --distributed auto

Inside a slice the weights are sharded over fsdp 32 x tensor 4; between the slices, over the slow network, only
gradients travel. 120,000 steps are 1.0 T tokens. Not run at full size by the authors; the tests lower its step on the
mesh of both slices.
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
from jaxscale.models.rope_config import RopeConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import run


def config() -> Config:
    return Config(
        name="lm_70b",
        model=TransformerConfig(
            vocabulary=128256,
            layers=80,
            width=8192,
            heads=64,
            kv_heads=8,
            head_dim=128,
            mlp=28672,
            rope=RopeConfig(
                theta=500000.0,
                scaling="llama3",
                factor=8.0,
                original_length=8192,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
            ),
            norm_epsilon=1e-5,
        ),
        steps=120_000,
        on="2x-v5p-256",
        mesh=MeshConfig(tensor=4),
        data=DataConfig(
            path="data/pretraining/*.jsonl.gz",
            tokenizer="data/llama3/tokenizer.json",
            sequence=8192,
            batch=1024,
            held_out_documents=1000,
        ),
        optim=OptimConfig(name="adamw", learning_rate=1.5e-4, schedule="cosine", warmup=2000, final=0.1),
        # 16 microbatches of 64 rows: one row per shard of the batch at a time.
        train=TrainConfig(microbatches=16, z_loss=1e-4),
        precision=PrecisionConfig(compute="bfloat16", weights="float32"),
        remat=RematConfig(policy="full"),
        evaluate=EvaluateConfig(every=1000, batches=16),
        checkpoint=CheckpointConfig(every=500),
    )


if __name__ == "__main__":
    run(__file__)
