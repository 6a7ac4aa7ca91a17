"""A small recommendation model on a made click log whose best possible AUC is known.

    python recipes/dlrm_clicks.py --devices 4

26 categorical and 13 dense features like Criteo's; 1,300,000 rows, of which the last 50,000 are held out. See
docs/recommendation.md for what it reaches.
"""

from jaxscale.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    PrecisionConfig,
)
from jaxscale.models.dlrm_config import DlrmConfig
from jaxscale.recipe import run

TABLES = (2000, 600, 5000, 3000, 100, 24, 1500, 300, 3, 4000, 1000, 3500, 2000)
TABLES += (26, 1500, 4000, 10, 700, 400, 4, 3800, 18, 15, 3000, 80, 1200)


def config() -> Config:
    return Config(
        name="dlrm_clicks",
        model=DlrmConfig(
            tables=TABLES,
            width=16,
            bottom=(64, 32),
            top=(128, 64),
            table_learning_rate=0.1,
        ),
        steps=1200,
        data=DataConfig(path="builtin:1300000", batch=1024, held_out_documents=50_000),
        optim=OptimConfig(name="adamw", learning_rate=2e-3, warmup=50, weight_decay=0.0, clip=0.0),
        precision=PrecisionConfig(compute="float32"),
        evaluate=EvaluateConfig(every=400),
        checkpoint=CheckpointConfig(every=400),
    )


if __name__ == "__main__":
    run(__file__)
