"""What a resume takes along: everything of the state, on the same devices bit for bit and on others within rounding."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from small_runs import EVERYTHING, STEPS, at_section, config_of, lines, losses, signal_self, stop_after, train

from jaxscale.checkpoint import tier
from jaxscale.checkpoint.layout import read_record
from jaxscale.checkpoint.restore import list_steps
from jaxscale.config import ConfigError
from jaxscale.recipe import Hooks
from jaxscale.track.jsonl import read_metrics
from jaxscale.train.protocols import ExitReason

HALF = 6


@pytest.fixture(scope="module", name="half")
def _half(tmp_path_factory):
    """`whole`, stopped after 6 of its 12 steps. Copy it."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stop_after(folder, HALF, *EVERYTHING, "--devices", 2)
    return folder


MORE = HALF + 3
"""An evaluation lies between: after step 8."""


def resume_in_a_copy(half, folder):
    """Goes on from `half` to step MORE. Returns the lines of these steps and the last record."""
    shutil.copytree(half, folder)
    with at_section("step", MORE - 1, signal_self()):
        assert train(folder, *EVERYTHING, "--devices", 2) is ExitReason.STOPPED
    return lines(folder)[HALF:], read_record(folder / "checkpoints" / str(MORE))


# On the same devices: bit for bit, and nothing of the state is there for show


def test_an_untouched_state_goes_on_bit_for_bit(tmp_path, half, whole):
    found, record = resume_in_a_copy(half, tmp_path / "run")
    assert found == lines(whole)[HALF:MORE]
    assert record.best == {"eval_loss": lines(whole)[HALF + 1]["eval_loss"], "step": 8}
    assert (record.step, record.row, record.epoch) == (MORE, 8 * MORE, 2)


def other_key(key):
    return key + jnp.uint32(1)


PERTURBATIONS = {
    "params": (lambda x: x * 1.001, {"loss", "grad_norm", "eval_loss"}),
    "opt": (lambda x: x * 1.5, {"eval_loss"}),
    "key": (other_key, {"loss", "grad_norm", "eval_loss"}),
    "ema": (lambda x: x * 1.01, {"eval_loss"}),
    "window": (lambda x: x + 1, {"spike"}),
    "skipped": (lambda x: x + 3, {"skipped"}),
}
"""Part of the state -> what is done to it, and what must show it in the lines of the next steps."""


@pytest.mark.parametrize("part", PERTURBATIONS)
def test_a_resume_notices_a_change_of(tmp_path, half, whole, monkeypatch, part):
    change, noticed = PERTURBATIONS[part]

    def perturbed(*args):
        state, record = original(*args)
        assert set(state) == set(PERTURBATIONS), "a part of the state that no perturbation is tried on"
        state[part] = jax.tree.map(lambda x: change(x).astype(x.dtype), state[part])
        return state, record

    original = tier.restore_newest
    monkeypatch.setattr(tier, "restore_newest", perturbed)
    found, _ = resume_in_a_copy(half, tmp_path / "run")
    expected = lines(whole)[HALF:MORE]
    different = {key for a, b in zip(found, expected, strict=True) for key in b if a[key] != b[key]}
    assert noticed <= different
    if part in ("window", "skipped", "ema"):
        assert noticed == {key for key in different if key in ("loss", "grad_norm", "eval_loss", "spike", "skipped")}


@pytest.mark.parametrize(("field", "value"), [("step", 5), ("row", 40)])
def test_a_resume_refuses_a_position_that_does_not_fit(tmp_path, half, monkeypatch, field, value):
    shutil.copytree(half, tmp_path / "run")
    original = tier.restore_newest

    def moved(*args):
        state, record = original(*args)
        return state, dataclasses.replace(record, **{field: value})

    monkeypatch.setattr(tier, "restore_newest", moved)
    with pytest.raises(ConfigError, match=r"keep data\.batch and the phases before step"):
        train(tmp_path / "run", *EVERYTHING, "--devices", 2)


def test_a_resume_keeps_the_best_evaluation(tmp_path, half, monkeypatch):
    original = tier.restore_newest

    def better(*args):
        state, record = original(*args)
        assert record.best["step"] == 4
        return state, dataclasses.replace(record, best={"eval_loss": 1.0, "step": 2})

    monkeypatch.setattr(tier, "restore_newest", better)
    _, record = resume_in_a_copy(half, tmp_path / "run")
    assert record.best == {"eval_loss": 1.0, "step": 2}


def test_a_line_that_the_disk_lost_is_written_again(tmp_path, half, whole):
    """The checkpoint carries the line of its step: a kill of the machine leaves no hole."""
    shutil.copytree(half, tmp_path / "lost")
    metrics = tmp_path / "lost" / "metrics.jsonl"
    kept = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(kept[: HALF - 1]) + kept[HALF - 1][:20])
    resume_in_a_copy(tmp_path / "lost", tmp_path / "run")
    assert lines(tmp_path / "run") == lines(whole)[:MORE]
    epochs = [line["epoch"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert epochs == [1] * HALF + [2] * (MORE - HALF)


# On other devices: the same rows, the same batches, losses within rounding


def checksum(params, batch):  # noqa: ARG001 -- the signature of a hook
    """Whole numbers that float32 adds up exactly in any order; they change when a token moves."""
    places = 1 + jnp.arange(batch["tokens"].shape[1]) % 5
    weight = batch["loss_weight"] * (1 + batch["row"][:, None] % 3).astype(jnp.float32)
    return {
        "tokens_sum": jnp.sum(batch["tokens"] * places * weight),
        "segments_sum": jnp.sum((batch["segment_ids"] * 7 + batch["positions"]) * weight),
    }


def test_saved_on_8_devices_and_resumed_on_4_and_on_1(tmp_path):
    flags = (*("--steps", STEPS, "--model.dropout", "0.1", "--optim.ema", "0.9"), "--data.held-out-documents", 1)
    hooks = Hooks(step_metrics=checksum)
    whole = tmp_path / "whole"
    assert train(whole, *flags, "--devices", 8, hooks=hooks) is ExitReason.COMPLETED
    stop_after(tmp_path / "8", HALF, *flags, "--devices", 8, hooks=hooks)
    assert lines(tmp_path / "8") == lines(whole)[:HALF]
    expected = lines(whole)
    for devices, *mesh in (4, "--mesh.tensor", 2, "--mesh.fsdp", 2), (1,):
        folder = shutil.copytree(tmp_path / "8", tmp_path / f"on-{devices}")
        assert train(folder, *flags, "--devices", devices, *mesh, hooks=hooks) is ExitReason.COMPLETED
        found = lines(folder)
        for name in ("step", "row", "rows", "tokens", "tokens_sum", "segments_sum"):
            assert [line[name] for line in found] == [line[name] for line in expected], name
        assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
        assert found[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], abs=1e-5)
        assert found[HALF:] != expected[HALF:], "a run on another mesh that rounds alike: was it another mesh?"
        saved = json.loads((folder / "config.json").read_bytes())["devices"]
        assert (saved, list_steps(folder / "checkpoints")) == (devices, [HALF, STEPS])
    assert config_of(*flags).model.dropout == 0.1
