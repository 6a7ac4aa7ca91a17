"""The same recipe on any mesh: gradients, norms and losses of `lm_parity` against one device, in float32."""

import json
from functools import lru_cache

import jax
import numpy as np
import parity_run
import pytest
from parity_run import parity_config
from parity_run import parity_run as run

from jaxscale.testing.processes import run_world

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4": {"tensor": 4},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "context 2 x tensor 2": {"context": 2, "tensor": 2},
    "expert 2 x fsdp 2": {"expert": 2, "fsdp": 2},
}


@lru_cache
def one_device(optimizer="adamw", microbatches=1, remat="none"):
    return run(parity_config(optimizer, microbatches, remat), {})


def assert_same(result, reference):
    paths = [path for path in reference if path.startswith("grad/")]
    assert len(paths) > 10
    assert result.keys() == reference.keys()
    for path in paths:
        norm = np.linalg.norm(reference[path])
        assert norm > 0, path
        assert np.linalg.norm(result[path] - reference[path]) <= 1e-5 * norm, path
    for path in reference:
        if path.startswith("init/"):
            np.testing.assert_array_equal(result[path], reference[path], err_msg=path)
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-6)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-5)


def test_the_run_learns_and_its_rows_differ():
    reference = one_device()
    assert reference["losses"][-1] < reference["losses"][0] - 0.5
    assert len(reference["losses"]) == parity_run.STEPS


@pytest.mark.parametrize("name", MESHES)
def test_meshes(name):
    assert_same(run(parity_config(), MESHES[name]), one_device())


@pytest.mark.parametrize("name", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_sgd(name):
    """AdamW and clipping hide a gradient that is off by a constant factor; SGD does not."""
    assert_same(run(parity_config("sgd"), MESHES[name]), one_device("sgd"))


@pytest.mark.parametrize("sizes", [{}, MESHES["data 2 x fsdp 2 x tensor 2"], {"fsdp": 8}], ids=str)
def test_microbatches(sizes):
    assert_same(run(parity_config(microbatches=4), sizes), one_device())


@pytest.mark.parametrize("policy", ["full", "dots", "names", "offload"])
def test_remat(policy):
    assert_same(run(parity_config(remat=policy), MESHES["data 2 x fsdp 2 x tensor 2"]), one_device())


@pytest.mark.parametrize(
    ("processes", "devices", "sizes"),
    [
        (2, 1, {"data": 2}),
        (2, 2, {"fsdp": 2, "tensor": 2}),
        (4, 1, {"fsdp": 4}),
        pytest.param(4, 1, {"data": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_processes(processes, devices, sizes, tmp_path):
    target = tmp_path / "result.npz"
    request = json.dumps({"sizes": sizes, "changes": {}})
    run_world([parity_run.__file__, "{distributed}", str(target), request], processes, devices)
    assert_same(dict(np.load(target)), one_device())


def test_padded_world():
    """Three devices do not divide 32 rows: the padding counts for nothing."""
    assert_same(run(parity_config(), {"data": 3}), one_device())
    assert_same(run(parity_config(microbatches=2), {"fsdp": 2, "data": 3}), one_device())


def test_a_wrong_gradient_would_be_noticed():
    reference = one_device()
    path = next(p for p in reference if p.startswith("grad/") and "mlp" in p)
    wrong = {**reference, path: reference[path] * (1 + 2e-5)}
    with pytest.raises(AssertionError):
        assert_same(wrong, reference)
    assert jax.device_count() == 8
