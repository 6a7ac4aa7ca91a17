"""One trained run that many tests compare with, and a cache folder of its own."""

import jax
import pytest
from small_runs import EVERYTHING, train

from jaxscale.train.protocols import ExitReason


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    assert len(jax.devices()) == 8, "made here, before a run that wants fewer makes as many as it wants"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", name="whole")
def _whole(tmp_path_factory):
    """An undisturbed run with everything in it, on 2 devices. Read only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, *EVERYTHING, "--devices", 2) is ExitReason.COMPLETED
    return folder
