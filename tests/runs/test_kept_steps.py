"""The checkpoints of real runs: loaded for a trial, kept as the settings say, versions of them."""

import json

import pytest
from small_runs import config_of, train

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.checkpoint.trial import try_to_load
from jaxscale.cli import main
from jaxscale.testing.checkpoints import flip
from jaxscale.train.protocols import ExitReason

EVALUATED = ("--data.held-out-documents", 1, "--evaluate.every", 2, "--evaluate.batches", 1)


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory):
    """A run on 2 devices that was gone on with three times, so that it saved at 2, 4, 6 and 8; best at 2."""
    run = tmp_path_factory.mktemp("kept") / "run"
    flags = ("--checkpoint.keep", 1, "--checkpoint.milestones", 4, "--devices", 2, "--optim.learning-rate", 3.0)
    for steps in (2, 4, 6, 8):
        assert train(run, "--steps", steps, *flags, *EVALUATED) is ExitReason.COMPLETED
    return run


def test_training_keeps_milestones_and_the_best_evaluation(trained, capsys):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    best = min(losses, key=losses.get)
    assert layout.list_steps(trained / "checkpoints") == sorted({best, 4, 8})
    assert main(["checkpoints", "list", str(trained), "--json"]) == 0
    found = {one["step"]: one for one in json.loads(capsys.readouterr().out)}
    assert found[8]["kept_because"][0] == "newest"
    assert "milestone of 4 steps" in found[4]["kept_because"]
    assert any(why.startswith("best evaluation") for why in found[best]["kept_because"])
    assert found[8]["loss"] == losses[8]


def test_a_trial_loads_the_whole_state_on_other_devices(trained, capsys):
    done = try_to_load(trained, 8)
    assert done.not_finite == ()
    manifest = layout.read_manifest(trained / "checkpoints" / "8")
    assert done.arrays == len(manifest.arrays)
    assert main(["checkpoints", "scrub", str(trained), "--rate", "0", "--test-load"]) == 0
    assert f"step 8 was loaded: {done.arrays} arrays" in capsys.readouterr().out


def test_a_trial_says_what_cannot_be_loaded(trained):
    path = trained / "checkpoints" / "4"
    array = next(file for file in path.glob("state/params.*/c/**/0") if file.is_file())
    flip(array, 3)
    try:
        with pytest.raises(DamagedCheckpoint, match="is damaged"):
            try_to_load(trained, 4)
    finally:
        flip(array, 3)


def test_the_defaults_are_those_of_the_page():
    checkpoint = config_of("--steps", 1).checkpoint
    assert (checkpoint.keep, checkpoint.milestones) == (10, 0)
