"""A recommendation model on 8 devices against one device: losses, norms, and all weights after 5 steps.

The optimizers are SGD and the tables' own: the weights' changes show a gradient that is off by a factor.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from dlrm_parity import dlrm_config, dlrm_run, with_rounds

MESHES = {"rows": {"data": 2, "fsdp": 2, "expert": 2}, "tensor": {"data": 2, "fsdp": 2, "tensor": 2}}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", name="one")
def _one():
    """Runs on one device, by placement."""
    return {placement: dlrm_run(dlrm_config(placement), {}) for placement in ("row", "mixed")}


def compare(many, one):
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(many["grad_norm"], one["grad_norm"], rtol=1e-5)
    for path in (path for path in one if path.startswith(("init/params/", "init/tables/"))):
        np.testing.assert_array_equal(many[path], one[path], err_msg=path)
        end = path.replace("init/", "end/", 1)
        change = np.linalg.norm(one[end].astype(np.float64) - one[path])
        off = np.linalg.norm(many[end].astype(np.float64) - one[end])
        assert off <= 1e-5 * change + 1e-9, (path, off, change)


@pytest.mark.parametrize("placement", ["row", "mixed"])
def test_eight_devices(placement, one):
    compare(dlrm_run(dlrm_config(placement), MESHES["rows"]), one[placement])
    moved = [p for p in one[placement] if p.startswith("end/tables/weights")]
    assert moved
    assert all((one[placement][p] != one[placement][p.replace("end", "init", 1)]).any() for p in moved)


def test_width_over_tensor_and_rows_over_the_rest(one):
    compare(dlrm_run(dlrm_config("mixed"), MESHES["tensor"]), one["mixed"])


def test_microbatches_and_several_rounds(one):
    got = dlrm_run(with_rounds(dlrm_config("row", microbatches=4)), {"fsdp": 8})
    compare(got, one["row"])
    assert got["table_rounds"].min() > 1
    assert one["row"]["table_rounds"].max() == 1
    assert got["table_ids"].tolist() == one["row"]["table_ids"].tolist()
    assert (got["table_unique"] < got["table_ids"]).all()
    assert (one["row"]["table_unique"] < got["table_unique"]).all(), "more is distinct where fewer are together"


def test_a_loss_that_is_not_finite_leaves_every_bit_as_it_is():
    """All steps are poisoned but the first: what that one left is what is there at the end."""

    def poison(batch, step):
        return {**batch, "label": batch["label"] * jnp.float32("nan")} if step else batch

    got = dlrm_run(dlrm_config("mixed"), {"fsdp": 4}, poison)
    first = dlrm_run(dataclasses.replace(dlrm_config("mixed"), steps=1), {"fsdp": 4})
    assert got["skipped"].tolist() == [0, 1, 2, 3, 4]
    for path in (path for path in got if path.startswith(("end/params", "end/tables"))):
        np.testing.assert_array_equal(got[path], first[path], err_msg=path)
