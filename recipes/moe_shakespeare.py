"""`lm_shakespeare` with a mixture of 8 experts in each layer, two of which a token goes to.

    python recipes/moe_shakespeare.py --devices 8 --mesh.expert 4

An expert has half the hidden units of the dense MLP, so that a token costs the same FLOPs but for the router's,
with 4 times the MLP weights. Loads are kept alike without an auxiliary loss, by a bias.
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
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import run

SHAKESPEARE = Path(__file__).resolve().parent / "data" / "shakespeare.jsonl.gz"


def config() -> Config:
    return Config(
        name="moe_shakespeare",
        # 257 tokens rounded up to a multiple of 8, so that the vocabulary divides over up to 8 devices.
        model=TransformerConfig(
            vocabulary=264,
            layers=4,
            width=256,
            heads=4,
            mlp=512,
            experts=ExpertsConfig(count=8, top_k=2, score="sigmoid", bias_step=1e-3, z_loss=1e-4),
            tied=True,
            qk_norm=True,
        ),
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
