"""Runs with further locations: a run directory that is gone, another mesh, damage, an owner that is alive."""

import json
import shutil

import pytest
from small_runs import (
    losses,
    stop_after,
    train,
)

from jaxscale.checkpoint import layout
from jaxscale.train.protocols import ExitReason

STEPS = 6
FLAGS = ("--steps", STEPS, "--optim.learning-rate", "0.01")
ON_2, ON_8 = ("--devices", 2), ("--devices", 8, "--mesh.tensor", 2)


def events(folder, kind):
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module", name="stopped")
def _stopped(tmp_path_factory):
    """A run that was stopped after step 4, with checkpoints 2 and 4 in its directory and at a location. Copy both."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after(folder / "run", 4, *FLAGS, *ON_2, "--checkpoint.every", 2, "--checkpoint.locations", folder / "far")
    return folder


def test_a_run_whose_directory_is_gone_goes_on_from_a_location_on_another_mesh(tmp_path, stopped):
    shutil.copytree(stopped / "far", tmp_path / "far")
    shutil.copytree(stopped / "run", tmp_path / "kept")
    flags = (*FLAGS, *ON_8, "--checkpoint.every", 2)
    assert layout.list_steps(tmp_path / "far" / "checkpoints")[-1:] == [4]
    assert train(tmp_path / "kept", *flags) is ExitReason.COMPLETED
    assert train(tmp_path / "new", *flags, "--checkpoint.locations", f"file://{tmp_path}/far") is ExitReason.COMPLETED
    assert losses(tmp_path / "kept")[4:] == [
        line["loss"]
        for line in map(json.loads, (tmp_path / "new" / "metrics.jsonl").read_text().splitlines())
        if line["step"] > 4
    ]
    (fetched,) = events(tmp_path / "new", "fetched")
    assert (fetched["step"], fetched["location"]) == (4, str(tmp_path / "far"))
    assert layout.list_steps(tmp_path / "far" / "checkpoints")[-2:] == [4, 6]
