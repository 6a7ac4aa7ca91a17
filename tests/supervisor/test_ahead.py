"""Programs of the next smaller world: every host has them in time, whoever will be in that world."""

from pathlib import Path

import pytest

from jaxscale.testing.processes import run_world

SCRIPT = str(Path(__file__).parent / "ahead_in_a_world.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One for each process of a world of three, as hosts with disks of their own have them."""
    folder = tmp_path_factory.mktemp("programs")
    run_world([SCRIPT, "{distributed}", "compile", str(folder)], 3, 2)
    return folder


@pytest.mark.parametrize("host", [0, 2])
def test_what_any_host_compiled_any_rank_of_the_smaller_world_loads(folders, host):
    """Host 2 has none of the devices that it compiled for; after the loss of host 0 it is one of the two."""
    stored = [path for path in (folders / str(host)).iterdir() if not path.suffix]
    assert len(stored) == 2, "the training step and the evaluation"
    outcomes = run_world([SCRIPT, "{distributed}", "load", str(folders / str(host))], 2, 2)
    assert [outcome.stdout.splitlines()[-1] for outcome in outcomes] == ["done"] * 2
