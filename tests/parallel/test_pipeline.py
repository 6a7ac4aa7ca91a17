"""The pipeline runtime: what its table says it reads is there; gradients are the dense model's, on any mesh."""

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

from jaxscale.cli import main
from jaxscale.config import ConfigError, PipelineConfig
from jaxscale.parallel.costs import make_table
from jaxscale.parallel.division import divide
from jaxscale.parallel.layer_layout import layer_layout
from jaxscale.parallel.rows import Row
from jaxscale.parallel.rows import rows as rows_of
from jaxscale.parallel.schedules import SCHEDULES, Kind, forward_only, one_at_a_time

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "parity"))
from parity_run import assert_same, parity_config  # noqa: E402 - beside the parity tests
from parity_run import parity_run as run  # noqa: E402


@st.composite
def tables(draw):
    name = draw(st.sampled_from([*SCHEDULES, "forward"]))
    stages = draw(st.integers(1, 4))
    chunks = draw(st.integers(1, 3)) if name in ("interleaved", "forward") else 1
    microbatches = stages * draw(st.integers(1, 3)) + (draw(st.integers(0, 2)) if name != "interleaved" else 0)
    if name == "forward":
        return forward_only(stages, microbatches, chunks)
    make = draw(st.sampled_from([one_at_a_time, make_table]))
    return make(name, stages, microbatches, chunks)


@given(tables())
def test_every_slot_that_is_read_has_what_is_wanted(table):
    """Executes the rows with names instead of numbers, as the runtime does: arrivals first, then the work of a tick."""
    rows, S = rows_of(table), table.stages
    inputs, gradients = ([{} for _ in range(S)] for _ in range(2))
    sent, back = [None] * S, [None] * S
    done = []
    for t in range(len(table.ticks)):
        row = [Row(*(int(column[t, s]) for column in rows)) for s in range(S)]
        for s in range(S):
            inputs[s][row[s].input_comes] = sent[(s - 1) % S]
            gradients[s][row[s].gradient_comes] = back[(s + 1) % S]
        sent, back = [None] * S, [None] * S
        for s in range(S):
            for own, microbatch, slot in (
                (row[s].forward, row[s].forward_microbatch, row[s].forward_input),
                (row[s].backward, row[s].backward_microbatch, row[s].backward_input),
                (row[s].weight, row[s].weight_microbatch, row[s].weight_input),
            ):
                chunk = own * S + s
                assert own < 0 or chunk == 0 or inputs[s][slot] == ("output", chunk - 1, microbatch)
            if row[s].forward >= 0:
                sent[s] = ("output", row[s].forward * S + s, row[s].forward_microbatch)
                done.append((Kind.FORWARD, *sent[s][1:]))
            if row[s].backward >= 0:
                chunk, microbatch = row[s].backward * S + s, row[s].backward_microbatch
                wanted = ("gradient", chunk + 1, microbatch)
                assert chunk == table.depth - 1 or gradients[s][row[s].backward_gradient] == wanted
                if row[s].backward_kind == Kind.BACKWARD_INPUT:
                    gradients[s][row[s].backward_gradient] = wanted
                back[s] = ("gradient", chunk, microbatch)
                done.append((row[s].backward_kind, chunk, microbatch))
            if row[s].weight >= 0:
                chunk, microbatch = row[s].weight * S + s, row[s].weight_microbatch
                assert gradients[s][row[s].weight_gradient] == ("gradient", chunk + 1, microbatch)
                done.append((Kind.BACKWARD_WEIGHT, chunk, microbatch))
    assert sorted(done) == sorted((op.kind, op.chunk, op.microbatch) for op in table.when())


# Against the dense model


@lru_cache
def dense(variant):
    """The reference: one device, the whole batch at once."""
    return run(parity_config("sgd", variant=variant), {})


@pytest.mark.parametrize(
    ("schedule", "chunks", "sizes", "changes"),
    [
        ("gpipe", 1, {"stage": 2, "data": 2, "tensor": 2}, {}),
        ("1f1b", 1, {"stage": 4, "fsdp": 2}, {"remat": "full"}),
        ("interleaved", 2, {"stage": 2, "expert": 2, "context": 2}, {}),
        ("zero-bubble", 1, {"stage": 4, "tensor": 2}, {"microbatches": 8}),
        ("1f1b", 1, {"stage": 2, "fsdp": 2}, {"variant": "everything"}),
        pytest.param("zero-bubble", 1, {"stage": 2, "fsdp": 2}, {"variant": "everything"}, marks=pytest.mark.slow),
        pytest.param("interleaved", 4, {"stage": 2}, {"variant": "lm_parity"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_and_losses_are_those_of_the_dense_model(schedule, chunks, sizes, changes):
    """All combinations: `scripts/bench/parallel.py`. Of each row a fifth of the tokens count, or all, or between."""
    changes = {"microbatches": 4, "variant": "deep", **changes}
    reference = dense(changes["variant"])
    config = dataclasses.replace(parity_config("sgd", **changes), pipeline=PipelineConfig(schedule, chunks))
    result = run(config, sizes)
    assert_same(result, reference)


# Checkpoints


def even(layers, stages, chunks):
    return divide(layers, stages, PipelineConfig("interleaved", chunks))


def test_layers_of_a_stage_lie_together():
    assert even(8, 2, 2).order == (0, 1, 4, 5, 2, 3, 6, 7)
    assert even(8, 4, 1).order == tuple(range(8))
    assert layer_layout(even(8, 4, 1)) is None


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_layer_has_one_place(stages, chunks, size):
    layers = stages * chunks * size
    places = even(layers, stages, chunks).order
    assert sorted(places) == list(range(layers))
    for s in range(stages):
        own = places[s * chunks * size : (s + 1) * chunks * size]
        assert {layer // size % stages for layer in own} == {s}


def test_only_stacked_layers_move():
    layout = layer_layout(even(4, 2, 2))
    state = {"params": {"layers": {"w": np.arange(8.0).reshape(4, 2)}, "embed": np.arange(4.0)}, "skipped": np.int32(1)}
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        state = jax.tree.map(jax.numpy.asarray, state)
        program = layout.restore(state)
        np.testing.assert_array_equal(program["params"]["layers"]["w"][:, 0], [0, 4, 2, 6])
        np.testing.assert_array_equal(program["params"]["embed"], np.arange(4.0))
        stored = layout.store(program)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), stored, state))


NANO = [str(ROOT / "recipes" / "lm_nano.py"), "--model.layers", "4", "--train.microbatches", "4", "--steps", "6"]
INTERLEAVED = ["--mesh.stage", "2", "--pipeline.schedule", "interleaved", "--pipeline.chunks", "2"]


def train(folder, *flags):
    assert (
        main(["train", *NANO, "--devices", "4", "--run.dir", str(folder), "--run.layer-stats-every", "1", *flags]) == 0
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_checkpoint_moves_between_layouts(tmp_path):
    """Half a run in chunks of two stages, the other half without stages, and the other way round."""
    alone = train(tmp_path / "alone")
    for name, first, then in (("to", INTERLEAVED, []), ("from", [], INTERLEAVED)):
        train(tmp_path / name, *first, "--steps", "3")
        lines = train(tmp_path / name, *then)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        for line, right in zip(lines, alone, strict=True):
            assert line["loss"] == pytest.approx(right["loss"], rel=2e-6)
            # Statistics are in the model's order of layers, whatever the program's.
            for path in ("layers/weight/layers/mlp/up", "layers/gradient/layers/attention/q"):
                np.testing.assert_allclose(line[path], right[path], rtol=1e-4)


def test_metrics_of_the_user_are_the_same_with_stages(tmp_path):
    recipe = tmp_path / "own.py"
    recipe.write_text(
        f"""
import importlib.util
import jax.numpy as jnp
from jaxscale.recipe import Hooks

spec = importlib.util.spec_from_file_location("nano", {NANO[0]!r})
nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nano)
config = nano.config

def hooks(config):
    def step_metrics(params, batch):
        return {{"even": ((batch["tokens"] % 2 == 0) * batch["loss_weight"]).sum()}}

    return Hooks(step_metrics=step_metrics)
"""
    )
    found = []
    for name, stages in (("one", []), ("two", ["--mesh.stage", "2"])):
        flags = [str(recipe), *NANO[1:], "--devices", "4", "--run.dir", str(tmp_path / name), "--steps", "2", *stages]
        assert main(["train", *flags]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["even"] for line in lines])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert 0.2 < found[0][0] < 0.8


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh.stage", "4", "--model.layers", "6"], "mesh axis 'stage' (4) does not divide layers (6)"),
        (
            ["--mesh.stage", "4", "--train.microbatches", "2"],
            "2 microbatches for 4 stages: 2 of them would always wait",
        ),
        (
            ["--mesh.stage", "2", "--pipeline.schedule", "interleaved", "--pipeline.chunks", "3"],
            "pipeline.chunks (3) does not divide the 2 layers of a stage; use 1 or 2",
        ),
        (["--mesh.stage", "2", "--pipeline.chunks", "2"], "the schedule 1f1b has one chunk a stage"),
        (
            ["--mesh.stage", "2", "--train.noise-scale"],
            "train.noise-scale needs the gradient of each microbatch by itself",
        ),
        (
            ["--mesh.stage", "4", "--model.window", "16", "0"],
            "model.window repeats every 2 layers, and 4 pipeline chunks",
        ),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(tmp_path, capsys, flags, message):
    code = main(["train", *NANO, "--devices", "4", "--run.dir", str(tmp_path / "run"), *flags])
    assert code == 2
    assert message in capsys.readouterr().err.replace("\n    ", " ")
    assert not (tmp_path / "run").exists()


def test_chunks_need_a_schedule_that_has_them():
    with pytest.raises(ConfigError, match="to interleaved, or pipeline"):
        PipelineConfig("gpipe", 2)
