"""Muon and Adafactor in whole runs: trained, stopped with a checkpoint, and continued on another mesh."""

import shutil

import jax
import jax.numpy as jnp
import pytest
from small_runs import STEPS, losses, stop_after, train

from jaxscale.checkpoint import tier
from jaxscale.train.protocols import ExitReason

HALF = 6
ON_8 = ("--devices", 8)
ON_4 = ("--devices", 4, "--mesh.tensor", 2, "--mesh.fsdp", 2)
SLOTS = {"muon": {"momentum", "mu", "nu"}, "adafactor": {"inputs", "outputs", "second_moment"}}


@pytest.mark.parametrize("name", SLOTS)
def test_a_run_goes_on_on_another_mesh(tmp_path, name, monkeypatch):
    """It does what a run that was never stopped does, and would not without the optimizer's state."""
    flags = ("--steps", STEPS, "--optim.name", name, "--optim.learning-rate", 0.01)
    assert train(tmp_path / "whole", *flags, *ON_8) is ExitReason.COMPLETED
    stop_after(tmp_path / "half", HALF, *flags, *ON_8)
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "half") == whole[:HALF]
    assert whole[-1] < whole[0] - 0.5

    resumed = shutil.copytree(tmp_path / "half", tmp_path / "resumed")
    assert train(resumed, *flags, *ON_4) is ExitReason.COMPLETED
    assert losses(resumed) == pytest.approx(whole, abs=1e-5)

    original = tier.restore_newest

    def forgetful(*args):
        state, record = original(*args)
        assert set(state["opt"]) == SLOTS[name]
        return {**state, "opt": jax.tree.map(jnp.zeros_like, state["opt"])}, record

    monkeypatch.setattr(tier, "restore_newest", forgetful)
    assert train(tmp_path / "half", *flags, *ON_8) is ExitReason.COMPLETED
    found = losses(tmp_path / "half")
    assert found[: HALF + 1] == whole[: HALF + 1], "the optimizer's state shows from the next update on"
    assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) > 1e-3
