"""A model with experts on any mesh: gradients and metrics of a batch against one device with as many microbatches.

All combinations of axes and schedules over five steps: `scripts/bench/parallel.py --rows parity --recipe moe_parity`.
"""

import dataclasses
import sys
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import axes, tree
from jaxscale.config import PipelineConfig, RematConfig, TrainConfig
from jaxscale.data.rows import empty_rows
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import load_recipe
from jaxscale.train.accumulate import loss_and_gradients
from jaxscale.train.evaluate import make_evaluate

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "parity"))
from parity_run import mesh_of  # noqa: E402 - beside the parity tests

ROWS, LENGTH = 8, 16
RECIPE = load_recipe(ROOT / "recipes" / "moe_parity.py").config
MODEL = TransformerConfig(
    vocabulary=64, layers=2, width=32, heads=4, mlp=32, experts=RECIPE.model.experts, tied=True
)  # fmt: skip


def config_of(microbatches=1, schedule="1f1b", chunks=1, layers=2, remat="none", **experts):
    model = dataclasses.replace(MODEL, layers=layers, experts=dataclasses.replace(MODEL.experts, **experts))
    return dataclasses.replace(
        RECIPE,
        model=model,
        train=TrainConfig(microbatches=microbatches),
        pipeline=PipelineConfig(schedule, chunks),
        remat=RematConfig(remat),
    )


def batch_of():
    """Rows that end in padding, and tokens that count or do not."""
    generator = np.random.default_rng(0)
    batch = empty_rows(LENGTH, np.arange(ROWS))
    for name in ("tokens", "targets"):
        batch[name] = generator.integers(0, MODEL.vocabulary, (ROWS, LENGTH)).astype(np.int32)
    batch["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    batch["segment_ids"] = (batch["positions"] < np.arange(9, 9 + ROWS)[:, None]).astype(np.int32)
    counted = generator.random((ROWS, LENGTH)) < 0.7
    batch["loss_weight"] = (counted * batch["segment_ids"]).astype(np.float32)
    return {n: jax.device_put(v, axes.sharding(("act_batch", "act_sequence")[: v.ndim])) for n, v in batch.items()}


def run(config, sizes, evaluated=False):
    """(gradients by path, metrics), and the sums of an evaluation beside them where they are asked for."""
    with jax.set_mesh(mesh_of(sizes)):
        task = config.model.task(config)
        params = jax.jit(task.init)(jax.random.key(0))
        parts = config.train.microbatches

        def program(params, batch):
            metrics, gradients = loss_and_gradients(task, params, batch, jax.random.key(0), parts, False)
            layout = task.stored_layout
            return metrics, gradients if layout is None else layout.store(gradients)

        metrics, gradients = jax.jit(program)(params, batch_of())
        if evaluated:
            metrics |= {f"evaluated/{name}": v for name, v in make_evaluate(task)(params, batch_of()).items()}
        return {path: np.asarray(leaf) for path, leaf in tree.flatten(gradients).items()}, jax.device_get(metrics)


@lru_cache
def one_device(**changes):
    return run(config_of(**changes), {})


def assert_same(found, right):
    gradients, metrics = right
    assert found[0].keys() == gradients.keys()
    for path, gradient in gradients.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, path
        assert np.linalg.norm(found[0][path] - gradient) <= 1e-5 * norm, path
    for name, value in metrics.items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({"expert": 2, "context": 2, "fsdp": 2}, {"dispatch": "dense"}),
        ({"expert": 2, "tensor": 2, "fsdp": 2}, {"dispatch": "ragged"}),
        pytest.param({"expert": 2, "tensor": 2}, {"dispatch": "dense"}, marks=pytest.mark.slow),
        pytest.param({"expert": 4, "fsdp": 2}, {"dispatch": "dense"}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "context": 2}, {"dispatch": "ragged"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_and_metrics_do_not_depend_on_the_mesh(sizes, changes):
    assert_same(run(config_of(**changes), sizes), one_device())


@pytest.mark.parametrize(
    ("schedule", "chunks", "layers", "sizes", "changes"),
    [
        ("1f1b", 1, 2, {"stage": 2, "expert": 2}, {}),
        ("zero-bubble", 1, 2, {"stage": 2, "expert": 2}, {"dispatch": "ragged"}),
        pytest.param("1f1b", 1, 2, {"stage": 2, "expert": 2}, {"capacity": 1.0}, marks=pytest.mark.slow),
        pytest.param("interleaved", 2, 4, {"stage": 2, "expert": 2}, {}, marks=pytest.mark.slow),
        pytest.param("gpipe", 1, 2, {"stage": 2, "expert": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_and_metrics_of_layers_come_through_stages(schedule, chunks, layers, sizes, changes):
    config = config_of(microbatches=4, schedule=schedule, chunks=chunks, layers=layers, **changes)
    without_dispatch = {name: value for name, value in changes.items() if name != "dispatch"}
    right = one_device(microbatches=4, layers=layers, **without_dispatch)
    found = run(config, sizes, evaluated=True)
    evaluated = {name.removeprefix("evaluated/"): v for name, v in found[1].items() if name.startswith("evaluated/")}
    assert_same((found[0], {name: found[1][name] for name in right[1]}), right)
    assert {"loss", "balance_loss", "router_z_loss", "tokens"} <= evaluated.keys()
    for name, value in evaluated.items():
        whole = right[1]["tokens"] if name == "tokens" else value / right[1]["tokens"]
        np.testing.assert_allclose(whole, right[1][name], rtol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "dots"])
def test_what_is_recomputed_changes_nothing(policy):
    assert_same(run(config_of(remat=policy, dispatch="ragged"), {}), one_device())


def test_a_balance_term_of_one_device_would_be_noticed():
    """The loss of parts of the tokens alone, added up, is another one."""
    right = one_device()
    parts = one_device(microbatches=4, layers=2)
    assert abs(parts[1]["balance_loss"] / right[1]["balance_loss"] - 1) > 1e-4
    np.testing.assert_allclose(parts[1]["layers/load"], right[1]["layers/load"], rtol=1e-6)
    with pytest.raises(AssertionError):
        assert_same(parts, right)
