"""MFU: published peaks, the measured one of a CPU and its cache."""

import json
from dataclasses import dataclass

import jax
import pytest

from jaxscale.axes import AXES
from jaxscale.mesh_file import load_chips
from jaxscale.train import flops
from jaxscale.train.flops import (
    cpu_peak_flops,
    measure_matmul_flops,
    model_flops_utilisation,
    peak_flops,
    whole_machine_flops,
)


@dataclass
class FakeDevice:
    device_kind: str
    platform: str = "tpu"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    return tmp_path / "cpu_peak.json"


@pytest.fixture
def measured(monkeypatch):
    calls: list[str] = []

    def measure(dtype):
        calls.append(dtype)
        return 1e11 * len(calls)

    monkeypatch.setattr(flops, "measure_matmul_flops", measure)
    return calls


def test_utilisation():
    assert model_flops_utilisation(2e12, 4.0, 1e12) == 0.5
    assert model_flops_utilisation(2e12, 4.0, None) is None
    assert model_flops_utilisation(2e12, 0.0, 1e12) is None


def test_accelerators_multiply_the_published_figure():
    for chip in load_chips().values():
        if not chip.is_measured:
            devices = [FakeDevice(chip.device_kinds[0].rstrip("*"), chip.platform)] * 4
            assert peak_flops(devices, "bfloat16") == 4 * chip.peak_flops("bfloat16")


def test_an_unknown_chip_has_no_peak():
    assert peak_flops([FakeDevice("abacus")], "bfloat16") is None


def test_emulated_devices_share_one_peak(measured):
    assert jax.device_count() == 8
    assert peak_flops(jax.devices(), "float32") == peak_flops(jax.devices()[:1], "float32") == 1e11
    assert measured == ["float32"]


def test_a_cpu_is_measured_once_per_dtype(measured, cache):
    assert cpu_peak_flops("float32") == cpu_peak_flops("float32") == 1e11
    assert cpu_peak_flops("bfloat16") == 2e11
    assert measured == ["float32", "bfloat16"]
    assert sorted(json.loads(cache.read_text()).values()) == [1e11, 2e11]


def test_a_disturbed_measurement_counts_as_if_undisturbed():
    undisturbed = whole_machine_flops(8e9, wall=1.0, worked=4.0, cores=4)
    assert undisturbed == 8e9
    # Four times as long on the clock, because others had three quarters of the cores.
    assert whole_machine_flops(8e9, wall=4.0, worked=4.0, cores=4) == undisturbed
    # Threads that wait by spinning work more than all cores could.
    assert whole_machine_flops(8e9, wall=1.0, worked=5.0, cores=4) == undisturbed
    assert whole_machine_flops(8e9, wall=1.0, worked=0.0, cores=4) == undisturbed


@pytest.mark.usefixtures("measured")
def test_a_torn_cache_is_measured_again(cache):
    cache.write_text('{"torn')
    assert cpu_peak_flops("float32") == 1e11
    assert list(json.loads(cache.read_text()).values()) == [1e11]


@pytest.mark.usefixtures("measured")
def test_a_cache_that_cannot_be_written_costs_no_run(cache, monkeypatch):
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv("JAXSCALE_CACHE", str(cache.parent / "file"))
    assert cpu_peak_flops("float32") == 1e11


def test_the_measurement_is_a_plausible_number_under_any_mesh(monkeypatch):
    monkeypatch.setattr(flops, "_SIDES", (64,))
    assert 1e6 < measure_matmul_flops("float32") < 1e15
    mesh = jax.make_mesh((1, 1, 8, 1, 1, 1), AXES)
    with jax.set_mesh(mesh):
        assert 1e6 < measure_matmul_flops("bfloat16") < 1e15
