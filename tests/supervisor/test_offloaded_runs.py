"""Supervised runs whose states lie in the hosts' memory, or whose weights are whole: faults and changes of both."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jaxscale.checkpoint.layout import check_files, list_steps, step_folder
from jaxscale.testing.cluster import launched, left_behind

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
FLAGS = (
    *("--slices", 1, "--hosts-per-slice", 2, "--devices-per-host", 2, "--steps", 60),
    *("--memory.every", 5, "--checkpoint.every", 20, "--checkpoint.keep", 9),
)
HOST = ("--state.offload", "opt", "params")


def digests(folder, step):
    shards = check_files(step_folder(folder / "checkpoints", step)).shards
    return {path: [shard.digest for shard in of_path] for path, of_path in shards.items()}


def train(folder, *flags, kill_at=None):
    """(losses by step, digests of the last step) of a run to its end, one of whose workers is killed at a step."""
    with launched(NANO, folder, *FLAGS, *flags) as run:
        if kill_at is not None:
            end = time.monotonic() + 60
            while len(run.metrics()) < kill_at:
                assert time.monotonic() < end, run.output
                time.sleep(0.02)
            os.kill(run.events("worker_started")[0]["pid"], signal.SIGKILL)
        assert run.finish() == 0, run.output
        assert "cannot be used" not in run.output
        assert len(run.events("worker_started")) > 2 or kill_at is None
        found = {line["step"]: line["loss"] for line in run.metrics()}
    assert not left_behind(folder)
    return found, digests(folder, 60)


@pytest.mark.slow
def test_a_killed_worker_and_a_change_of_where_the_state_lies(tmp_path):
    """The bits of a run without offload; then on from a durable step with whole weights, to its losses."""
    plain_losses, plain = train(tmp_path / "plain")
    losses, last = train(tmp_path / "host", *HOST, kill_at=25)
    assert losses == plain_losses
    assert last == plain
    steps = tmp_path / "host" / "checkpoints"
    shutil.rmtree(step_folder(steps, 60))
    before = list_steps(steps)[-1]
    losses, _ = train(tmp_path / "host", "--state.zero", 1)
    after = range(before + 1, 61)
    np.testing.assert_allclose([losses[n] for n in after], [plain_losses[n] for n in after], rtol=1e-3)
