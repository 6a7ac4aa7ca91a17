"""Stages of unequal numbers of layers: the dense model's gradients, losses and checkpoints, and no trace of padding.

Equal stages are in `test_pipeline.py`.
"""

import dataclasses
import json
import sys
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxscale import tree
from jaxscale.checkpoint.layout import check_files, step_folder
from jaxscale.cli import main
from jaxscale.config import ConfigError, OptimConfig, PipelineConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.parallel.division import Division, balanced, divide
from jaxscale.parallel.layer_layout import layer_layout, stored_spec
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

ROOT = Path(__file__).parents[2]
for folder in ("parity", "parallel"):
    sys.path.insert(0, str(ROOT / "tests" / folder))
from parity_run import assert_same as assert_same_training  # noqa: E402 - beside the parity tests
from parity_run import mesh_of, parity_config  # noqa: E402
from parity_run import parity_run as run  # noqa: E402
from test_expert_parity import assert_same, batch_of  # noqa: E402
from test_expert_parity import config_of as with_experts  # noqa: E402
from test_expert_parity import run as run_experts  # noqa: E402


def config_of(layers, pipeline=None, microbatches=4, **changes):
    config = parity_config("sgd", microbatches=microbatches, **changes)
    model = dataclasses.replace(config.model, layers=layers)
    return dataclasses.replace(config, model=model, pipeline=pipeline or PipelineConfig())


@lru_cache
def dense(layers, variant):
    """The reference: one device, the whole batch at once."""
    return run(config_of(layers, microbatches=1, variant=variant), {})


@st.composite
def divisions(draw):
    stages, chunks = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    return Division(stages, tuple(draw(st.integers(1, 4)) for _ in range(stages * chunks)))


# Where layers lie


@given(divisions())
def test_every_layer_has_one_place_and_the_rest_is_padding(division):
    places = division.order
    assert len(places) == division.places == division.longest * len(division.sizes)
    assert sorted(layer for layer in places if layer is not None) == list(range(division.layers))
    for place, layer in enumerate(places):
        stage, own = divmod(place, division.longest * division.chunks)
        chunk = own // division.longest * division.stages + stage
        first = sum(division.sizes[:chunk])
        assert layer is None or first <= layer < first + division.sizes[chunk]


@given(divisions())
def test_a_layout_undoes_itself_and_pads_with_zeros(division):
    layout = layer_layout(division)
    stored = np.arange(1.0, 2 * division.layers + 1).reshape(division.layers, 2)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        state = {"params": {"layers": {"w": jax.numpy.asarray(stored)}, "norm": jax.numpy.ones(3)}}
        if layout is None:
            assert len(set(division.sizes)) == 1
            return
        program = layout.restore(state)
        back = layout.store(program)
    rows = np.asarray(program["params"]["layers"]["w"])
    for row, layer in zip(rows, division.order, strict=True):
        np.testing.assert_array_equal(row, 0 if layer is None else stored[layer])
    np.testing.assert_array_equal(back["params"]["layers"]["w"], stored)


def test_what_stages_do_not_divide_is_split_over_them_by_another_dim():
    """Else a checkpoint's arrays would be whole on each stage while it is written."""
    sizes = {"stage": 4, "fsdp": 2, "tensor": 2}
    program = P("stage", "fsdp", "tensor")
    assert stored_spec((8, 64, 64), program, sizes) == program
    assert stored_spec((6, 64, 256), program, sizes) == P(None, "fsdp", ("tensor", "stage"))
    assert stored_spec((6, 64, 6), program, sizes) == P(None, ("fsdp", "stage"), "tensor")
    assert stored_spec((6, 6, 6), program, sizes) == P(None, "fsdp", "tensor")
    assert stored_spec((6,), P("stage"), sizes) == P(None)


# Against the dense model


@pytest.mark.parametrize(
    ("schedule", "layers", "sizes", "changes"),
    [
        ("1f1b", (1, 2), {"stage": 2, "fsdp": 2}, {}),
        pytest.param("1f1b", (2, 2, 1, 1), {"stage": 4, "tensor": 2}, {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param("gpipe", (1, 3, 1), {"stage": 3, "expert": 2}, {}, marks=pytest.mark.slow),
        pytest.param("interleaved", (2, 3, 1, 1), {"stage": 2, "context": 2, "data": 2}, {}, marks=pytest.mark.slow),
        pytest.param("zero-bubble", (1, 3, 1), {"stage": 3, "data": 2}, {}, marks=pytest.mark.slow),
        pytest.param("1f1b", (2, 4), {"stage": 2, "fsdp": 2}, {"variant": "everything"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_and_losses_are_those_of_the_dense_model(schedule, layers, sizes, changes):
    reference = dense(sum(layers), changes.get("variant", "lm_parity"))
    pipeline = PipelineConfig(schedule, len(layers) // sizes["stage"], layers)
    result = run(config_of(sum(layers), pipeline, **changes), sizes)
    assert_same_training(result, reference)


@pytest.mark.parametrize(
    ("schedule", "layers", "sizes", "changes"),
    [
        pytest.param("1f1b", (1, 2), {"stage": 2, "expert": 2}, {}, marks=pytest.mark.slow),
        pytest.param("interleaved", (1, 2, 1, 1), {"stage": 2, "expert": 2}, {"capacity": 1.0}, marks=pytest.mark.slow),
        pytest.param("zero-bubble", (2, 1), {"stage": 2, "fsdp": 2}, {"dispatch": "ragged"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_and_the_metrics_of_their_layers(schedule, layers, sizes, changes):
    """In training, and in an evaluation that goes forward only: each layer's load at its own place."""
    without_dispatch = {name: value for name, value in changes.items() if name != "dispatch"}
    right = run_experts(with_experts(microbatches=4, layers=sum(layers), **without_dispatch), {})
    config = with_experts(microbatches=4, layers=sum(layers), **changes)
    pipeline = PipelineConfig(schedule, len(layers) // sizes["stage"], layers)
    found = run_experts(dataclasses.replace(config, pipeline=pipeline), sizes, evaluated=True)
    evaluated = {name.removeprefix("evaluated/"): v for name, v in found[1].items() if name.startswith("evaluated/")}
    assert found[1]["layers/load"].shape == (sum(layers), 8)
    assert_same((found[0], {name: found[1][name] for name in right[1]}), right)
    assert {"loss", "balance_loss", "router_z_loss", "tokens"} <= evaluated.keys()
    for name, value in evaluated.items():
        whole = right[1]["tokens"] if name == "tokens" else value / right[1]["tokens"]
        np.testing.assert_allclose(whole, right[1][name], rtol=1e-6, err_msg=name)


# Padding


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "adafactor", "sgd"))]
)
def test_padding_stays_zero_and_changes_no_update(optimizer):
    """Weights with decay, their average and, but for a constant of Adafactor's, what the optimizer keeps."""
    config = with_experts(microbatches=2, layers=3)
    optim = OptimConfig(name=optimizer, learning_rate=0.01, weight_decay=0.1, clip=1e-3, ema=0.9)
    config = dataclasses.replace(config, optim=optim)
    found = {}
    for name, sizes, layers in (("dense", {}, ()), ("stages", {"stage": 2}, (1, 2))):
        own = dataclasses.replace(config, pipeline=PipelineConfig(layers=layers))
        with jax.set_mesh(mesh_of(sizes)):
            task = own.model.task(own)
            made = make_optimizer(own.optim, task.parameters, own.steps)
            state = jax.jit(lambda o=own, t=task, m=made: init_state(o, t, m))()
            step = make_step(own, task, made)
            for number in range(2):
                state, metrics = step(state, batch_of(), jax.numpy.int32(number))
            kept = jax.device_get({key: state[key] for key in ("params", "opt", "ema")})
            if layers:
                division = task.division
                kept_by_place, state = kept, jax.jit(task.stored_layout.store)(state)
                kept = jax.device_get({key: state[key] for key in ("params", "opt", "ema")})
            found[name] = tree.flatten(kept), jax.device_get(metrics)
    padding = [place for place, layer in enumerate(division.order) if layer is None]
    assert padding == [1]
    for path, leaf in tree.flatten(kept_by_place).items():
        if "/layers/" in path:
            assert leaf.shape[0] == 4, path
            limit = 1e-29 if optimizer == "adafactor" and path.startswith("opt/") else 0
            assert np.abs(leaf[padding]).max() <= limit, path
    (right, right_metrics), (state, metrics) = found["dense"], found["stages"]
    assert state.keys() == right.keys()
    for path, leaf in right.items():
        assert state[path].shape == leaf.shape, path
        if path.startswith("params/"):  # Adam divides gradients near zero by their own size
            assert np.linalg.norm(state[path] - leaf) <= 1e-4 * np.linalg.norm(leaf), path
    for name in ("loss", "grad_norm", "imbalance"):
        np.testing.assert_allclose(metrics[name], right_metrics[name], rtol=1e-5, err_msg=name)


# Checkpoints

NANO = [
    str(ROOT / "recipes" / "lm_nano.py"), "--devices", "4", "--model.layers", "5", "--train.microbatches", "4",
    "--run.layer-stats-every", "1", "--data.held-out-documents", "1", "--evaluate.batches", "1",
]  # fmt: skip
UNEQUAL = ["--mesh.stage", "2", "--pipeline.layers", "3", "2"]
CHUNKS = [
    "--mesh.stage", "2", "--pipeline.schedule", "interleaved", "--pipeline.chunks", "2",
    "--pipeline.layers", "1", "2", "1", "1",
]  # fmt: skip


def train(folder, steps, *flags):
    assert main(["train", *NANO, "--run.dir", str(folder), "--steps", str(steps), *flags]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run without stages, and its lines."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, train(folder, 4)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (UNEQUAL, []),
        pytest.param([], UNEQUAL, marks=pytest.mark.slow),
        pytest.param(UNEQUAL, CHUNKS, marks=pytest.mark.slow),
        pytest.param(CHUNKS, ["--mesh.stage", "4", "--pipeline.layers", "1", "1", "1", "2"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_checkpoint_moves_between_layouts(tmp_path, alone, first, then):
    folder, right = alone
    train(tmp_path / "run", 2, *first)
    arrays = check_files(step_folder(tmp_path / "run" / "checkpoints", 2)).arrays
    assert arrays == check_files(step_folder(folder / "checkpoints", 4)).arrays
    lines = train(tmp_path / "run", 4, *then)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, wanted in zip(lines, right, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=2e-6)
        for path in ("layers/weight/layers/mlp/up", "layers/gradient/layers/attention/q"):
            assert len(line[path]) == 5
            np.testing.assert_allclose(line[path], wanted[path], rtol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(UNEQUAL, marks=pytest.mark.slow),
        [*UNEQUAL, "--optim.ema", "0.9", "--state.offload", "opt", "ema"],
        pytest.param([*CHUNKS, "--state.offload", "opt"], marks=pytest.mark.slow),
        pytest.param([*UNEQUAL, "--mesh.fsdp", "2", "--state.zero", "1"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_bits_of_one_that_went_through(tmp_path, flags):
    """Also where layers have to come out of the hosts' memory to be put in order."""
    kept_there = flags.index("--state.offload") if "--state.offload" in flags else len(flags)
    whole = train(tmp_path / "whole", 4, *flags[:kept_there], "--checkpoint.every", "2")
    train(tmp_path / "run", 2, *flags)
    assert [line["loss"] for line in train(tmp_path / "run", 4, *flags)] == [line["loss"] for line in whole]
    for step in (2, 4):
        folders = [step_folder(tmp_path / run / "checkpoints", step) for run in ("whole", "run")]
        assert check_files(folders[0]).arrays == check_files(folders[1]).arrays


# What a person is told


def test_the_balance_counts_the_head():
    config = config_of(8)
    small = dataclasses.replace(config.model, vocabulary=8)
    large = dataclasses.replace(config.model, vocabulary=2048)
    assert balanced(config, small.task(config).parameters, 4) == (2, 2, 2, 2)
    found = balanced(config, large.task(config).parameters, 4)
    assert found[-1] == 1
    assert sum(found) == 8
    windows = dataclasses.replace(config, model=dataclasses.replace(config.model, window=(16, 0)))
    assert all(count % 2 == 0 for count in balanced(windows, small.task(config).parameters, 3))
    assert balanced(config, dataclasses.replace(small, layers=3).task(config).parameters, 4) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh.stage", "2"], "'stage' (2) does not divide layers (5); use 1 or 5, or --pipeline.layers 3 2"),
        (["--mesh.stage", "2", "--pipeline.layers", "2", "2"], "4 layers in all, and model.layers is 5"),
        (["--mesh.stage", "2", "--pipeline.layers", "2", "2", "1"], "divides the model into 3, and 2 stages are 2"),
        (["--mesh.stage", "2", "--pipeline.layers", "5", "0"], "each piece of the model has 1 layer or more"),
        (
            ["--mesh.stage", "2", "--mesh.data", "2", "--pipeline.layers", "3", "2", "--across.gradients", "top-k"],
            "across.gradients keeps arrays for each slice that have no place yet beside the padding of unequal",
        ),
        (
            ["--mesh.stage", "2", "--mesh.data", "2", "--pipeline.layers", "3", "2", "--local.every", "2"],
            "local.every keeps arrays for each slice that have no place yet",
        ),
        (
            ["--mesh.stage", "2", "--model.layers", "6", "--model.window", "16", "0", "--pipeline.layers", "3", "3"],
            "model.window repeats every 2 layers, and 2 pipeline chunks have 3 3 layers",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_says_how_it_could(tmp_path, capsys, flags, message):
    assert main(["train", *NANO, "--run.dir", str(tmp_path / "run"), *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_without_stages_a_division_means_nothing():
    assert divide(5, 1, PipelineConfig(layers=(3, 2))) == Division(1, (5,))
    with pytest.raises(ConfigError, match="make the sum 5"):
        divide(5, 2, PipelineConfig(layers=(3, 3)))
