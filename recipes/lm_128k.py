"""Llama 3.1 8B on rows of 131,072 tokens: the last, long phase of its training, 4.2 M tokens a step on one TPU slice.

    python recipes/lm_128k.py --on v5p-512 --data.path gs://BUCKET/long --init-from gs-mounted/lm_8b

A row is divided over mesh.context 8, so that a chip has 16,384 tokens of it: with 8 key heads each chip attends to the
whole row with one of them (Ulysses; docs/parallelism.md has the arithmetic). Not run at full size by the authors; the
tests lower its step on the mesh of the slice.
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
        name="lm_128k",
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
        steps=5000,
        on="v5p-512",
        mesh=MeshConfig(context=8),
        data=DataConfig(
            path="data/long/*.jsonl.gz",
            tokenizer="data/llama3/tokenizer.json",
            sequence=131072,
            batch=32,
            held_out_documents=100,
        ),
        optim=OptimConfig(name="adamw", learning_rate=3e-5, schedule="cosine", warmup=100, final=0.1),
        train=TrainConfig(microbatches=1, z_loss=1e-4),
        precision=PrecisionConfig(compute="bfloat16", weights="float32"),
        remat=RematConfig(policy="full"),
        evaluate=EvaluateConfig(every=500, batches=4),
        checkpoint=CheckpointConfig(every=250),
    )


if __name__ == "__main__":
    run(__file__)
