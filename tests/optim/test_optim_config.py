"""Settings of the optimizer that cannot work are refused by name."""

import pytest

from jaxscale.config import ConfigError, OptimConfig


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 0.0},
        {"adam_learning_rate": -1.0},
        {"weight_decay": -0.1},
        {"epsilon": 0.0},
        {"b1": 1.0},
        {"b2": 1.5},
        {"momentum": -0.1},
        {"warmup": -1},
        {"decay": 0.0},
        {"final": 1.1},
        {"clip": -1.0},
        {"ema": 1.0},
    ],
    ids=str,
)
def test_refused_by_name(setting):
    with pytest.raises(ConfigError, match=f"optim.{next(iter(setting)).replace('_', '-')} is"):
        OptimConfig(**setting)


def test_edges_that_work():
    OptimConfig(b1=0.0, b2=0.0, momentum=0.0, weight_decay=0.0, clip=0.0, decay=1.0, final=0.0)
