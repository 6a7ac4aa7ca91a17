"""A byte-level transformer of 4.3 M parameters on the works of Shakespeare, two of which are held out.

    python recipes/lm_shakespeare.py --devices 8

1.5 M training bytes take a few minutes on 2 quiet cores and bring the held-out loss to 1.64 nats per byte (2.4 bits).
The corpus lies beside this file.
"""

from pathlib import Path

from jaxscale.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    PrecisionConfig,
    RematConfig,
    SampleConfig,
)
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import run

SHAKESPEARE = Path(__file__).resolve().parent / "data" / "shakespeare.jsonl.gz"


def config() -> Config:
    return Config(
        name="lm_shakespeare",
        # 257 tokens rounded up to a multiple of 8, so that the vocabulary divides over up to 8 devices.
        model=TransformerConfig(vocabulary=264, layers=4, width=256, heads=4, mlp=1024, tied=True, qk_norm=True),
        steps=732,
        data=DataConfig(path=str(SHAKESPEARE), tokenizer="bytes", sequence=256, batch=8, held_out_documents=2),
        optim=OptimConfig(name="adamw", learning_rate=3e-3, b2=0.98, schedule="cosine", warmup=30, final=0.02),
        # CPUs, where this recipe is at home, compute float32 faster than bfloat16.
        precision=PrecisionConfig(compute="float32"),
        remat=RematConfig(policy="none"),
        evaluate=EvaluateConfig(every=366),
        sample=SampleConfig(every=366, prompt="ROMEO.\n", tokens=200),
    )


if __name__ == "__main__":
    run(__file__)
