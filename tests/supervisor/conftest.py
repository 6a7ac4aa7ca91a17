"""Fixtures of the supervisor's tests."""

import pytest


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory):
    """Programs are compiled once for all runs of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
