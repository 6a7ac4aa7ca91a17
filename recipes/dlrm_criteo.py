"""DLRM with the tables of Criteo's terabyte of clicks on one TPU slice: 204 million rows of tables, 26 B parameters.

    python recipes/dlrm_criteo.py --on v6e-16 --data.path /mnt/clicks --run.dir /mnt/runs/dlrm_criteo

Table sizes are those of 24 days of logs with at most 40 million ids of a feature, as in MLPerf's benchmark. 64,000
steps of 65,536 rows are one pass over 4.2 billion of them. Not run at full size by the authors; tests lower its step
on the slice's mesh.
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

MILLIONS = 40_000_000
TABLES = (MILLIONS, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, MILLIONS, 3067956, 405282, 10)
TABLES += (2209, 11938, 155, 4, 976, 14, MILLIONS, MILLIONS, MILLIONS, 590152, 12973, 108, 36)


def config() -> Config:
    return Config(
        name="dlrm_criteo",
        model=DlrmConfig(
            tables=TABLES,
            width=128,
            bottom=(512, 256),
            top=(1024, 1024, 512, 256),
            exchange=2.0,
            table_learning_rate=0.04,
        ),
        steps=64_000,
        on="v6e-16",
        data=DataConfig(path="data/criteo", batch=65_536, held_out_documents=80_000_000),
        optim=OptimConfig(name="adamw", learning_rate=1e-3, warmup=2000, weight_decay=0.0, clip=0.0),
        precision=PrecisionConfig(compute="bfloat16"),
        evaluate=EvaluateConfig(every=8000, batches=200),
        checkpoint=CheckpointConfig(every=2000),
    )


if __name__ == "__main__":
    run(__file__)
