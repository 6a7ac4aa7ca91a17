"""The same recipe on any mesh: gradients, norms and losses of `lm_parity` against one device, in float32."""

import json
from functools import lru_cache

import jax
import numpy as np
import parity_run
import pytest
from parity_run import assert_same, parity_config
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
def one_device(optimizer="adamw", variant="lm_parity"):
    """The reference: the whole batch at once, nothing recomputed."""
    return run(parity_config(optimizer, variant=variant), {})


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


@pytest.mark.parametrize(
    ("name", "microbatches", "remat"),
    [
        ("one", 4, "full"),
        pytest.param("one", 1, "dots", marks=pytest.mark.slow),
        ("data 8", 4, "full"),
        pytest.param("data 8", 1, "dots", marks=pytest.mark.slow),
        ("fsdp 8", 4, "dots"),
        ("fsdp 8", 1, "full"),
        ("tensor 4", 4, "dots"),
        ("tensor 4", 1, "full"),
        ("data 2 x fsdp 2 x tensor 2", 4, "none"),
    ],
)
def test_microbatches_and_remat(name, microbatches, remat):
    """With `test_remat` and `test_processes`: every mesh with microbatches, `full` and `dots`, and these together."""
    assert_same(run(parity_config(microbatches=microbatches, remat=remat), MESHES.get(name, {})), one_device())


@pytest.mark.parametrize("policy", ["full", "dots", "names", "offload"])
def test_remat(policy):
    assert_same(run(parity_config(remat=policy), MESHES["data 2 x fsdp 2 x tensor 2"]), one_device())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("data 8", {}, marks=pytest.mark.slow),
        pytest.param("fsdp 8", {}, marks=pytest.mark.slow),
        ("tensor 4", {"microbatches": 4}),
        ("data 2 x fsdp 2 x tensor 2", {"microbatches": 4, "remat": "full"}),
    ],
    ids=str,
)
def test_a_model_with_everything(name, changes):
    """Tied, with QK-norm, windows and both soft-caps."""
    changes = {"variant": "everything", **changes}
    assert_same(run(parity_config(**changes), MESHES[name]), one_device(variant="everything"))


@pytest.mark.parametrize(
    ("processes", "devices", "sizes", "changes"),
    [
        (2, 1, {"data": 2}, {}),
        (2, 2, {"fsdp": 2, "tensor": 2}, {}),
        (2, 1, {"fsdp": 2}, {"microbatches": 4, "remat": "full"}),
        (4, 1, {"fsdp": 4}, {}),
        pytest.param(4, 1, {"data": 2, "tensor": 2}, {"microbatches": 4, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param(2, 1, {"tensor": 2}, {"microbatches": 4, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"fsdp": 4}, {"microbatches": 4, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"data": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_processes(processes, devices, sizes, changes, tmp_path):
    target = tmp_path / "result.npz"
    request = json.dumps({"sizes": sizes, "changes": changes})
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
