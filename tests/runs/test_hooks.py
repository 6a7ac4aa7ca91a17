"""A recipe's hooks: what they may return, and what is said of one that returns something else."""

import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import ROOT, lines, run, train

from jaxscale.config import ConfigError
from jaxscale.recipe import Hooks
from jaxscale.train.hooks import HookError
from jaxscale.train.loop import UNFINISHED
from jaxscale.train.metrics import is_reserved
from jaxscale.train.protocols import ExitReason

PAGE = ROOT / "docs" / "hooks.md"
ONE = ("--steps", 1, "--devices", 1)


def weights(_, batch):
    return batch["loss_weight"].sum()


@pytest.mark.parametrize(
    ("results", "said"),
    [
        *(
            (lambda params, batch, name=name: {name: weights(params, batch)}, f"returns '{name}', which a line")
            for name in ("row", "step", "grad_norm", "learning_rate", "skipped", "tokens", "nonfinite", "eval_loss")
        ),
        (lambda _, batch: {"loss": batch["loss_weight"].sum()}, "returns 'loss', which a line"),
        (lambda _, batch: {"layers/x": batch["loss_weight"].sum()}, "returns 'layers/x', which a line"),
        (lambda _, batch: {"mine/x": batch["loss_weight"].sum()}, "returns 'mine/x', a name of one of hooks.evalu"),
        (
            lambda _, batch: {"x": batch["loss_weight"]},
            "returns 'x' of shape (4, 32); return a sum weighted by loss_we",
        ),
        (lambda *_: {"x": "much"}, "returns 'x' as str; return a sum weighted by loss_weight"),
        (lambda *_: {"x": 1j * jnp.ones(())}, "returns 'x' of dtype complex64"),
        (lambda *_: {1: 2.0}, "returns a value under the name 1; use a text"),
        (lambda *_: 2.0, "returns float; return a dict from names to numbers"),
        ("weights", "is 'weights'; give a function of (params, batch)"),
    ],
)
def test_step_metrics_that_no_line_can_hold_are_refused_at_the_start(tmp_path, results, said):
    hooks = Hooks(step_metrics=results, evaluations={"mine": lambda _: {}})
    with pytest.raises(ConfigError, match=r"^hooks\.step_metrics " + re.escape(said)):
        train(tmp_path / "run", *ONE, "--train.microbatches", 2, hooks=hooks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("evaluations", "said"),
    [
        ({"layers": lambda _: {}}, "'layers', under which metrics.jsonl has other fields"),
        ({"": lambda _: {}}, "the name ''; use a text that is not empty"),
        ({"mine": 3}, r"hooks.evaluations['mine'] is 3; give a function"),
        ([], "hooks.evaluations is []; give a dict from names to functions"),
    ],
)
def test_evaluations_that_cannot_be_run_are_refused_at_the_start(tmp_path, evaluations, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        train(tmp_path / "run", *ONE, hooks=Hooks(evaluations=evaluations))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({"x": np.ones(3)}, "returns 'x' of shape (3,); return one number"),
        ({"x": "much"}, "returns 'x' as str; return one number"),
        ({None: 1.0}, "returns a value under the name None"),
        (None, "returns NoneType; return a dict from names to numbers"),
        ({"b/c": 1.0}, "returns 'b/c', but another evaluation has written 'mine/b/c'"),
    ],
)
def test_an_evaluation_whose_results_no_line_can_hold_is_named(tmp_path, results, said):
    hooks = Hooks(evaluations={"mine/b": lambda _: {"c": 1}, "mine": lambda _: results})
    with pytest.raises(HookError, match=re.escape(f"evaluation 'mine' of the recipe's hooks, after step 1, {said}")):
        train(tmp_path / "run", *ONE, hooks=hooks)


def test_numbers_of_every_kind_are_taken(tmp_path):
    hooks = Hooks(
        step_metrics=lambda *_: {"a": 3, "b": np.float32(2), "c": jnp.bfloat16(1), "d": True},
        evaluations={"mine": lambda _: {"a": 3, "b": np.float32(2), "c": jnp.bfloat16(1), "d": True}},
    )
    assert train(tmp_path / "run", *ONE, hooks=hooks) is ExitReason.COMPLETED
    (line,) = lines(tmp_path / "run")
    assert [line[f"mine/{name}"] for name in "abcd"] == [3.0, 2.0, 1.0, 1.0]
    assert [line[name] * line["tokens"] for name in "abcd"] == pytest.approx([3, 2, 1, 1], rel=1e-6)


def test_sums_are_divided_by_the_weight_of_the_whole_batch(tmp_path):
    """Three devices, two microbatches: rows of padding in each of them. On one device there is neither."""

    def step_metrics(_, batch):
        weight = batch["loss_weight"]
        late = batch["row"][:, None] % 8 >= 6  # the last rows, which share their devices with the padding
        return {"one": weight.sum(), "odd": (weight * (batch["targets"] % 2)).sum(), "late": (weight * late).sum()}

    hooks, found = Hooks(step_metrics=step_metrics), {}
    for devices, parts in ((1, 1), (3, 2)):
        flags = ("--steps", 2, "--devices", devices, "--mesh.data", devices, "--train.microbatches", parts)
        folder = tmp_path / str(devices)
        assert train(folder, *flags, "--train.z-loss", 0.01, hooks=hooks) is ExitReason.COMPLETED
        found[devices] = lines(folder)
    for alone, padded in zip(found[1], found[3], strict=True):
        assert padded["tokens"] == alone["tokens"]
        assert alone["one"] == pytest.approx(1, rel=1e-6)
        assert 0.1 < alone["late"] < 0.4
        for name in ("one", "odd", "late", "z_loss", "loss", "grad_norm"):
            assert padded[name] == pytest.approx(alone[name], rel=1e-5), name
        assert alone["z_loss"] > 0.1


def test_every_field_of_the_run_itself_is_reserved(whole):
    found = {name for line in lines(whole) for name in line}
    assert {"noise_scale", "eval_loss", "spike"} <= found
    assert {name for name in found if not is_reserved(name)} == set()
    assert is_reserved(UNFINISHED)
    assert not is_reserved("accuracy")


def test_the_example_of_the_page_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "with_hooks.py").write_text(code)
    flags = ("--devices", "2", "--steps", "4", "--evaluate.every", "2", "--run.dir", "run")
    result = run([sys.executable, "with_hooks.py", *flags], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = lines(tmp_path / "run")
    assert all(0 < line["spaces"] < 0.5 for line in found)
    assert ["near/loss" in line for line in found] == ["near/loss_after" in line for line in found]
    assert ["near/loss" in line for line in found] == [False, True, False, True]
    last = found[-1]
    assert (
        min(last["near/loss"], last["near/loss_after"])
        < last["eval_loss"]
        < max(last["near/loss"], last["near/loss_after"])
    )
