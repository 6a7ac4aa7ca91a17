"""Llama 3.1 8B from scratch on one TPU slice: 8.03 B parameters, rows of 8,192 tokens, 4.2 M tokens a step.

    python recipes/lm_8b.py --on v5p-512 --data.path gs://BUCKET/tokens --run.dir gs-mounted/lm_8b
    python recipes/lm_8b.py --on v6e-256 --data.path gs://BUCKET/tokens

240,000 steps are 1.0 T tokens. Model FLOPs: 6.1e16 a million tokens with attention. Not run at full size by the
authors; the tests lower its step on the mesh of either slice.
"""

from jaxscale.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
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
        name="lm_8b",
        model=TransformerConfig(
            vocabulary=128256,
            layers=32,
            width=4096,
            heads=32,
            kv_heads=8,
            head_dim=128,
            mlp=14336,
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
        steps=240_000,
        on="v5p-512",
        data=DataConfig(
            path="data/pretraining/*.jsonl.gz",
            tokenizer="data/llama3/tokenizer.json",
            sequence=8192,
            batch=512,
            held_out_documents=1000,
        ),
        optim=OptimConfig(name="adamw", learning_rate=3e-4, schedule="cosine", warmup=2000, final=0.1),
        train=TrainConfig(microbatches=1, z_loss=1e-4),
        precision=PrecisionConfig(compute="bfloat16", weights="float32"),
        remat=RematConfig(policy="full"),
        evaluate=EvaluateConfig(every=1000, batches=16),
        checkpoint=CheckpointConfig(every=500),
    )


if __name__ == "__main__":
    run(__file__)
