"""Every shipped mesh file and chip figure, and what the reader refuses."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from jaxscale.axes import AXES
from jaxscale.config import MeshConfig
from jaxscale.mesh import resolve_sizes
from jaxscale.mesh_file import AXES as FILE_AXES
from jaxscale.mesh_file import (
    MeshFileError,
    _chip,
    chip_of,
    load_chip,
    load_chips,
    load_mesh_file,
    mesh_names,
)

CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200", "b200", "cpu")
GOOD = {"chip": '"cpu"', "slices": "1", "hosts_per_slice": "1", "devices_per_host": "8"}


def write(tmp_path, tail: str = "", **keys: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in (GOOD | keys).items() if value) + tail)
    return str(path)


def test_the_meshes_that_ship():
    assert set(mesh_names()) == {"cpu-8", "v5e-256", "v6e-16", "v6e-256", "v5p-512", "2x-v5p-256", "h100-64"}


@pytest.mark.parametrize("name", mesh_names())
def test_shipped_mesh_file(name):
    file = load_mesh_file(name)
    chip = load_chip(file.chip)
    assert file.name == name
    assert file.devices == file.slices * file.hosts_per_slice * file.devices_per_host
    sizes = resolve_sizes(MeshConfig(), file.devices, file.slices, file.axes)
    assert math.prod(sizes.values()) == file.devices
    if chip.platform == "cpu":
        assert file.topology == ""
        return
    assert file.devices_per_host == chip.devices_per_host.value
    if chip.platform == "tpu":
        kind, _, shape = file.topology.partition(":")
        assert kind == file.chip
        assert math.prod(int(size) for size in shape.split("x")) == file.devices_per_slice
        assert file.devices_per_slice <= chip.fast_domain.value


@pytest.mark.parametrize(
    ("name", "devices", "slices", "hosts"),
    [
        ("cpu-8", 8, 1, 1),
        ("v5e-256", 256, 1, 64),
        ("v6e-256", 256, 1, 64),
        ("v5p-512", 256, 1, 64),  # Google's 512 are TensorCores, two per chip and per JAX device
        ("2x-v5p-256", 256, 2, 64),
        ("h100-64", 64, 1, 8),
    ],
)
def test_size_of_shipped_meshes(name, devices, slices, hosts):
    file = load_mesh_file(name)
    assert (file.devices, file.slices, file.hosts) == (devices, slices, hosts)


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_has_a_source(name):
    chip = load_chips()[name]
    figures = [*chip.peak.values(), chip.hbm_bytes, chip.hbm_bandwidth, chip.fast_link_bandwidth, chip.fast_links]
    for figure in [*figures, chip.fast_domain, chip.dcn_bandwidth, chip.devices_per_host]:
        assert len(figure.source) > 10
        assert figure.value > 0 or name == "cpu"
    assert chip.is_measured == (name == "cpu")


def test_all_chips_are_listed():
    assert tuple(load_chips()) == CHIPS


def test_figures_are_of_the_right_order():
    """Catches a slipped digit or unit: every accelerator lies between these."""
    for chip in load_chips().values():
        if chip.is_measured:
            continue
        assert 1e14 < chip.peak_flops("bfloat16") < 1e16
        assert 16e9 <= chip.hbm_bytes.value < 1e12
        assert 100 < chip.peak_flops("bfloat16") / chip.hbm_bandwidth.value < 1000  # FLOPs per byte
        assert 5e11 < chip.hbm_bandwidth.value < 1e13
        all_links = chip.fast_link_bandwidth.value * chip.fast_links.value
        assert 1e11 < all_links < 1e12
        assert 1e9 < chip.dcn_bandwidth.value < all_links
        assert chip.peak_flops("float32") <= chip.peak_flops("bfloat16")


@pytest.mark.parametrize(
    ("kind", "platform", "name"),
    [
        ("TPU v4", "tpu", "v4"),
        ("TPU v5 lite", "tpu", "v5e"),
        ("TPU v5e", "tpu", "v5e"),
        ("TPU v5", "tpu", "v5p"),
        ("TPU v5p", "tpu", "v5p"),
        ("TPU v6 lite", "tpu", "v6e"),
        ("TPU7x", "tpu", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100"),
        ("NVIDIA H100 80GB HBM3", "gpu", "h100"),
        ("NVIDIA H200", "gpu", "h200"),
        ("NVIDIA B200", "gpu", "b200"),
        ("cpu", "cpu", "cpu"),
        ("NVIDIA H100 PCIe", "gpu", None),  # slower than the SXM form: no figure is better than a wrong one
        ("TPU v3", "tpu", None),
    ],
)
def test_chip_of_a_device(kind, platform, name):
    chip = chip_of(SimpleNamespace(device_kind=kind, platform=platform))
    assert (chip.name if chip else None) == name
    assert chip is None or chip.platform == platform


def test_chip_of_this_machine():
    chip = chip_of(jax.devices()[0])
    assert chip is load_chip("cpu")


def test_peak_of_float32():
    assert load_chip("v5e").peak_flops("float32") == 197e12  # matmuls take bfloat16 inputs at default precision
    assert load_chip("a100").peak_flops("float32") == 156e12
    with pytest.raises(MeshFileError, match=r"chip 'v4' has no peak for float8; chips.toml has bfloat16, int8"):
        load_chip("v4").peak_flops("float8")
    with pytest.raises(MeshFileError, match=r"chip 'cpu' has no peak for bfloat16; .* measured at run time"):
        load_chip("cpu").peak_flops("bfloat16")


def test_axes_are_those_of_the_mesh():
    assert FILE_AXES == AXES


def test_own_file_by_path(tmp_path):
    path = write(tmp_path, '[axes]\ntensor = 2\n[environment]\nXLA_FLAGS = "--some"\n')
    file = load_mesh_file(path)
    assert (file.name, file.devices, file.topology) == ("mine", 8, "")
    assert (dict(file.axes), dict(file.environment)) == ({"tensor": 2}, {"XLA_FLAGS": "--some"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-265", "unknown mesh 'v5e-265'; did you mean 'v5e-256'? --on takes 2x-v5p-256, cpu-8, h100-64, v5e-256"),
        ("zzz", "unknown mesh 'zzz'; --on takes"),
        ("chips", "unknown mesh 'chips'"),
        (
            "nowhere/mine.toml",
            "there is no mesh file 'nowhere/mine.toml'; give a path that exists or one of 2x-v5p-256",
        ),
    ],
)
def test_unknown_mesh(name, message):
    with pytest.raises(MeshFileError) as error:
        load_mesh_file(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("keys", "tail", "message"),
    [
        ({"slices": ""}, "", "slices missing"),
        ({"slices": "0"}, "", "slices is 0; it is a whole number of at least 1"),
        ({"hosts_per_slice": "1.5"}, "", "hosts_per_slice is 1.5; it is a whole number"),
        ({"devices_per_host": "true"}, "", "devices_per_host is True; it is a whole number"),
        ({"chip": '"v5"'}, "", "unknown chip 'v5'; did you mean 'v5"),
        ({"slice": "2"}, "", "unknown key 'slice'; did you mean 'slices'?"),
        ({}, "[axes]\ntensors = 2\n", "unknown key 'tensors'; did you mean 'tensor'?"),
        ({}, "[axes]\ntensor = 0\n", "axes.tensor is 0; it is a whole number of at least 1"),
        ({}, '[axes]\ntensor = "2"\n', "axes.tensor is '2'; it is a whole number"),
        ({}, "[environment]\nDEBUG = 1\n", "[environment]: DEBUG is 1; environment variables are strings"),
        ({"topology": "5"}, "", "topology is 5; it is a string"),
        ({}, "oops", "is not valid TOML"),
    ],
)
def test_file_that_is_wrong(keys, tail, message, tmp_path):
    path = write(tmp_path, tail, **keys)
    with pytest.raises(MeshFileError) as error:
        load_mesh_file(path)
    assert message in str(error.value)
    assert path in str(error.value) or "unknown chip" in message


def test_figure_without_source_is_refused():
    entry = {"platform": "tpu", "device_kinds": ["x"], "peak": {"bfloat16": {"value": 1.0, "source": ""}}}
    names = ["hbm_bytes", "hbm_bandwidth", "fast_link_bandwidth", "fast_links"]
    names += ["fast_domain", "dcn_bandwidth", "devices_per_host"]
    entry |= {key: {"value": 1, "source": "a datasheet"} for key in names}
    with pytest.raises(MeshFileError, match=re.escape("[new] peak.bfloat16 is {'value': 1.0, 'source': ''}; write")):
        _chip("new", entry)
    entry.pop("dcn_bandwidth")
    with pytest.raises(MeshFileError, match=r"\[new\]: dcn_bandwidth missing"):
        _chip("new", entry)


def test_reading_mesh_files_imports_no_jax():
    code = (
        "import sys, jaxscale.mesh_file as m; m.load_chips(); m.load_mesh_file('cpu-8'); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
