"""Mesh sizes, device order over ICI and DCN, and what is set before the backend exists."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from jaxscale import mesh as meshes
from jaxscale.axes import AXES
from jaxscale.config import Config, MeshConfig, ModelConfig, RunConfig
from jaxscale.mesh import MeshError, device_order, make_mesh, mesh_sizes_for, resolve_sizes
from jaxscale.mesh_file import MeshFileError
from jaxscale.train.protocols import World


def config(**changes) -> Config:
    return Config("test", ModelConfig(), **changes)


def sizes(**given) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | given


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What device order reads of a jax.Device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def fake_tpus(shape: tuple[int, int, int], slices: int) -> list[FakeDevice]:
    """TPU v5p slices: 4 chips per process, ids counting on from slice to slice."""
    chips = list(itertools.product(*(range(size) for size in reversed(shape))))
    return [
        FakeDevice(
            id=s * len(chips) + i, process_index=(s * len(chips) + i) // 4, slice_index=s, coords=tuple(reversed(chip))
        )
        for s in range(slices)
        for i, chip in enumerate(chips)
    ]


def fake_hosts(processes: int, per_process: int, platform: str = "cpu", hosts_are_slices: bool = False):
    return [
        FakeDevice(2048 * p + i, p, p if hosts_are_slices else 0, platform, platform)
        for p in range(processes)
        for i in range(per_process)
    ]


# Sizes.


@pytest.mark.parametrize(
    ("mesh", "devices", "slices", "expected"),
    [
        (MeshConfig(), 8, 1, sizes(fsdp=8)),
        (MeshConfig(), 1, 1, sizes()),
        (MeshConfig(), 256, 2, sizes(data=2, fsdp=128)),
        (MeshConfig(tensor=2), 8, 1, sizes(fsdp=4, tensor=2)),
        (MeshConfig(data=8), 8, 1, sizes(data=8)),
        (MeshConfig(data=4, tensor=4), 256, 2, sizes(data=4, fsdp=16, tensor=4)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, 1, sizes(data=2, fsdp=2, tensor=2)),
        (MeshConfig(stage=2, expert=2, context=2), 8, 1, sizes(stage=2, expert=2, context=2)),
    ],
)
def test_unset_axes(mesh, devices, slices, expected):
    assert resolve_sizes(mesh, devices, slices) == expected


def test_config_comes_before_the_mesh_files_defaults():
    defaults = {"tensor": 4, "context": 2}
    assert resolve_sizes(MeshConfig(), 64, 1, defaults) == sizes(fsdp=8, tensor=4, context=2)
    assert resolve_sizes(MeshConfig(tensor=8, context=1), 64, 1, defaults) == sizes(fsdp=8, tensor=8)


@pytest.mark.parametrize(
    ("mesh", "devices", "slices", "message"),
    [
        (
            MeshConfig(stage=1, data=2, fsdp=3),
            8,
            1,
            "mesh stage 1 x data 2 x fsdp 3 x expert 1 x context 1 x tensor 1 = 6 does not match 8 devices; "
            "use mesh.fsdp 4, or leave mesh.fsdp unset",
        ),
        (
            MeshConfig(fsdp=4),
            8,
            1,
            "= 4 does not match 8 devices; use mesh.data 2 or mesh.fsdp 8, or leave mesh.fsdp unset",
        ),
        (MeshConfig(fsdp=4, data=1), 8, 1, "use mesh.data 2 or mesh.fsdp 8, or leave mesh.fsdp unset"),
        (
            MeshConfig(fsdp=3, tensor=3),
            8,
            1,
            "the axes other than fsdp multiply to 3, and must multiply to a divisor of 8",
        ),
        (MeshConfig(tensor=2, context=8), 8, 1, "use mesh.context 1, 2 or 4"),
        (MeshConfig(tensor=3), 8, 1, "tensor 3 = 6 does not match 8 devices; use mesh.tensor 1, 2, 4 or 8"),
        (MeshConfig(tensor=16), 8, 1, "tensor 16 = 16 does not match 8 devices; use mesh.tensor 1, 2, 4 or 8"),
        (
            MeshConfig(context=3, tensor=3),
            8,
            1,
            "the axes other than fsdp multiply to 9, and must multiply to a divisor",
        ),
        (MeshConfig(data=3), 8, 2, "mesh axis 'data' (3) is not a multiple of the 2 slices"),
        (MeshConfig(data=1), 8, 2, "use 2, 4 or 8, or leave mesh.data unset"),
        (MeshConfig(), 9, 2, "9 devices cannot be 2 equal slices; use 1, 3 or 9 slices"),
    ],
)
def test_sizes_that_do_not_fit(mesh, devices, slices, message):
    with pytest.raises(MeshError) as error:
        resolve_sizes(mesh, devices, slices)
    assert message in str(error.value)


axis_sizes = st.one_of(st.none(), st.sampled_from([1, 2, 3, 4, 8]))


@given(
    mesh=st.builds(MeshConfig, **dict.fromkeys(AXES, axis_sizes)),
    devices=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 64, 96, 256]),
    slices=st.sampled_from([1, 2, 3, 4]),
)
def test_sizes_multiply_to_the_devices_or_are_refused(mesh, devices, slices):
    set_axes = {axis: size for axis, size in dataclasses.asdict(mesh).items() if size is not None}
    try:
        resolved = resolve_sizes(mesh, devices, slices)
    except MeshError:
        data = set_axes.get("data", slices)
        others = math.prod(size for axis, size in set_axes.items() if axis != "data") * data
        fits = devices % others == 0 if "fsdp" not in set_axes else devices == others
        assert not (fits and devices % slices == 0 and data % slices == 0)
        return
    assert tuple(resolved) == AXES
    assert math.prod(resolved.values()) == devices
    assert resolved["data"] % slices == 0
    assert set_axes.items() <= resolved.items()
    assert all(resolved[axis] == 1 for axis in AXES if axis not in set_axes and axis not in ("data", "fsdp"))


# Device order.


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=4, tensor=4), MeshConfig(tensor=2, context=2)])
def test_data_axis_goes_across_slices(mesh):
    devices = fake_tpus((4, 4, 8), slices=2)
    resolved = resolve_sizes(mesh, 256, 2)
    array = device_order(list(reversed(devices)), resolved, 2)
    assert array.shape == tuple(resolved.values())
    assert {device.id for device in array.flat} == set(range(256))
    per_slice = resolved["data"] // 2
    for (_, data, *_), device in np.ndenumerate(array):
        assert device.slice_index == data // per_slice


def test_same_order_as_jax_hybrid_mesh():
    devices = fake_tpus((4, 4, 4), slices=2)
    expected = mesh_utils.create_hybrid_device_mesh((1, 1, 16, 1, 1, 4), (1, 2, 1, 1, 1, 1), devices)
    assert (device_order(devices, sizes(data=2, fsdp=16, tensor=4), 2) == expected).all()


def test_inner_axes_are_torus_neighbours():
    array = device_order(fake_tpus((4, 4, 4), slices=1), sizes(fsdp=16, tensor=4), 1)
    for ring in array.reshape(16, 4):
        coords = np.array([device.coords for device in ring])
        hops = np.abs(coords - np.roll(coords, 1, axis=0))
        assert (np.minimum(hops, 4 - hops).sum(axis=1) == 1).all()


def test_a_torus_dim_may_be_split_between_axes():
    array = device_order(fake_tpus((4, 4, 4), slices=1), sizes(fsdp=32, tensor=2), 1)
    assert array.shape == (1, 1, 32, 1, 1, 2)


def test_processes_stand_in_for_slices():
    devices = [dataclasses.replace(device, id=-device.id) for device in fake_hosts(processes=4, per_process=2)]
    array = device_order(devices[::-1], sizes(data=2, fsdp=2, tensor=2), 2)
    processes = np.vectorize(lambda device: device.process_index)(array).reshape(2, 2, 2)
    assert processes.tolist() == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]


def test_one_process_emulates_slices_by_blocks():
    array = device_order(fake_hosts(1, 8), sizes(data=2, fsdp=4), 2)
    assert [[device.id for device in row] for row in array.reshape(2, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_gpu_nodes_keep_their_devices_on_the_inner_axes():
    """GPU hosts have a slice_index each, but count as one slice unless a mesh file or mesh.data says otherwise."""
    devices = fake_hosts(processes=8, per_process=8, platform="gpu", hosts_are_slices=True)
    array = device_order(devices[::-1], sizes(fsdp=8, tensor=8), 1)
    for node in array.reshape(8, 8):
        assert len({device.process_index for device in node}) == 1
    assert meshes._slices(devices) == 1
    assert meshes._slices(fake_tpus((2, 2, 1), slices=3)) == 3


@pytest.mark.parametrize(
    ("devices", "slices", "message"),
    [
        (fake_tpus((2, 2, 1), slices=4), 2, "2 equal slices are expected, but the devices are slice 0: 4, slice 1: 4"),
        (fake_tpus((2, 2, 1), slices=2)[:6], 2, "the devices are slice 0: 4, slice 1: 2"),
        (fake_hosts(3, 2), 2, "3 processes cannot be 2 slices of whole processes; use a multiple of 2 processes"),
    ],
)
def test_slices_that_the_devices_do_not_have(devices, slices, message):
    with pytest.raises(MeshError) as error:
        device_order(devices, sizes(data=slices, fsdp=len(devices) // slices), slices)
    assert message in str(error.value)


# Meshes.


def test_mesh_has_all_six_explicit_axes():
    mesh = make_mesh(config(mesh=MeshConfig(data=2, tensor=2)))
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert meshes.mesh_sizes(mesh) == sizes(data=2, fsdp=2, tensor=2)
    assert meshes.describe(mesh) == "8 cpu devices: data 2 x fsdp 2 x tensor 2"
    assert [device.id for device in mesh.devices.flat] == list(range(8))


def test_fewer_devices_than_there_are():
    mesh = make_mesh(config(devices=4, mesh=MeshConfig(tensor=2)))
    assert meshes.mesh_sizes(mesh) == sizes(fsdp=2, tensor=2)
    one = make_mesh(config(), jax.devices()[3:4])
    assert meshes.describe(one) == "1 cpu device: every axis 1"
    assert meshes.mesh_sizes(make_mesh(config(on="cpu-8", devices=2))) == sizes(fsdp=2)


def test_mesh_file_with_two_emulated_slices(tmp_path):
    file = tmp_path / "twice.toml"
    file.write_text('chip = "cpu"\nslices = 2\nhosts_per_slice = 1\ndevices_per_host = 4\n[axes]\ntensor = 2\n')
    mesh = make_mesh(config(on=str(file)))
    assert meshes.mesh_sizes(mesh) == sizes(data=2, fsdp=2, tensor=2)
    assert [device.id for device in mesh.devices[:, 0].flat] == [0, 1, 2, 3]
    assert mesh_sizes_for(config(on=str(file), mesh=MeshConfig(tensor=4))) == sizes(data=2, tensor=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"on": "v5e-256"},
            "--on v5e-256 is 256 devices of chip v5e (TPU v5 lite or TPU v5e), but JAX runs on 8 cpu devices; "
            "start it on that machine, or drop --on to use what is here",
        ),
        ({"on": "v5e-256", "devices": 8}, "--devices 8 emulates CPU devices, but --on v5e-256 is 256 v5e devices"),
        ({"devices": 16}, "--devices 16 wants 16 CPU devices, but JAX has 8 cpu devices; call prepare_backend before"),
        ({"on": "cpu-9"}, "unknown mesh 'cpu-9'; did you mean 'cpu-8'?"),
        ({"mesh": MeshConfig(tensor=3)}, "does not match 8 devices"),
    ],
)
def test_mesh_that_the_machine_cannot_form(changes, message):
    with pytest.raises((MeshError, MeshFileError)) as error:
        make_mesh(config(**changes))
    assert message in str(error.value)


def test_emulation_needs_the_cpu_backend():
    gpus = fake_hosts(1, 8, platform="gpu")
    with pytest.raises(
        MeshError, match="--on cpu-8 emulates CPU devices, but JAX runs on 8 gpu devices; set JAX_PLATFORMS"
    ):
        make_mesh(config(on="cpu-8"), gpus)


def test_sizes_without_devices():
    assert mesh_sizes_for(config(on="2x-v5p-256", mesh=MeshConfig(tensor=4))) == sizes(data=2, fsdp=32, tensor=4)
    assert mesh_sizes_for(config(devices=16)) == sizes(fsdp=16)
    assert mesh_sizes_for(config(mesh=MeshConfig(fsdp=4, tensor=2))) == sizes(fsdp=4, tensor=2)
    mesh = meshes.abstract_mesh_for(config(on="v5p-512", mesh=MeshConfig(tensor=8)))
    assert meshes.mesh_sizes(mesh) == sizes(fsdp=32, tensor=8)
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}


# Before the backend.


def in_new_process(code: str, **environment: str) -> dict:
    names = {"JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "JAXSCALE_CACHE", "XLA_FLAGS"}
    variables = {k: v for k, v in os.environ.items() if k not in names} | {"JAX_PLATFORMS": "cpu", **environment}
    start = (
        "import json, os, jax\nfrom jaxscale.mesh import *\nfrom jaxscale.config import *\n"
        "from jaxscale.train.protocols import World\n"
        "config = lambda **changes: Config('test', ModelConfig(), **changes)\n"
        "cache = lambda: [str(jax.config.jax_compilation_cache_dir), jax.config.jax_enable_compilation_cache]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_prepare_backend_sets_everything(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text(
        'chip = "cpu"\nslices = 1\nhosts_per_slice = 1\ndevices_per_host = 6\n'
        '[environment]\nMINE = "from the file"\nUSERS = "from the file"\n'
        'XLA_FLAGS = "--xla_cpu_enable_fast_math=false"\n'
    )
    code = f"""
c = config(on={str(file)!r})
prepare_backend(c, World(processes=2, index=1))
out = dict(gloo=jax.config.jax_cpu_collectives_implementation, cache=cache(), mine=os.environ["MINE"])
out |= dict(users=os.environ["USERS"], least=jax.config.jax_persistent_cache_min_compile_time_secs)
print(json.dumps(out | dict(devices=jax.device_count(), flags=os.environ["XLA_FLAGS"])))
"""
    out = in_new_process(code, USERS="from the user", JAXSCALE_CACHE=str(tmp_path))
    assert out["devices"] == 3  # 6 dealt out to 2 processes
    assert out["gloo"] == "gloo"
    assert out["cache"] == [str(tmp_path / "compile"), True]
    assert out["least"] == 0.0
    assert out["flags"] == f"--xla_cpu_enable_fast_math=false {meshes.EMULATION_FLAG}=false"
    assert (out["mine"], out["users"]) == ("from the file", "from the user")


@pytest.mark.parametrize(
    ("devices", "users", "expected"),
    [
        (2, "", "--xla_cpu_enable_concurrency_optimized_scheduler=false"),
        (2, "--xla_cpu_enable_fast_math=false", "--xla_cpu_enable_fast_math=false {added}"),
        (2, "--xla_cpu_enable_concurrency_optimized_scheduler=true", None),
        (0, "", None),
    ],
)
def test_emulated_devices_get_a_schedule_in_which_they_do_not_stand(devices, users, expected):
    code = f"""
prepare_backend(config(devices={devices}, run=RunConfig(compilation_cache="off")))
devices = jax.device_count()  # XLA ends a process whose flags it does not know
print(json.dumps(dict(flags=os.environ["XLA_FLAGS"], devices=devices)))
"""
    out = in_new_process(code, XLA_FLAGS=users)
    added = f"{meshes.EMULATION_FLAG}=false"
    assert out == {"flags": users if expected is None else expected.format(added=added), "devices": devices or 1}


def test_prepare_backend_after_the_backend():
    code = """
def attempt(**changes):
    try:
        prepare_backend(config(run=RunConfig(compilation_cache="off"), **changes.pop("config")), **changes)
    except MeshError as error:
        return str(error)
    return "fine"
jax.config.update("jax_num_cpu_devices", 4)
jax.devices()
out = [attempt(config=dict(devices=devices)) for devices in (0, 2, 4, 8)]
out += [attempt(config=dict(devices=8), world=World(processes=n, address="h:1")) for n in (2, 4, 3)]
print(json.dumps(dict(answers=out, cache=cache()[1])))
"""
    out = in_new_process(code)
    assert out["cache"] is False
    assert out["answers"][:3] == ["fine", "fine", "fine"]
    assert "8 emulated devices are wanted in this process, but JAX already runs with 4" in out["answers"][3]
    assert out["answers"][4] == "fine"  # 8 over 2 processes is 4 here
    assert "2 emulated devices are wanted in this process, but JAX already runs with 4" in out["answers"][5]
    assert "8 emulated devices cannot be dealt out to 3 processes; use a multiple of 3" in out["answers"][6]


@pytest.mark.parametrize(
    ("setting", "told", "expected"),
    [
        ("off", "/told", None),
        ("/mine", "/told", "/mine"),
        ("auto", "/told", "/told"),
        ("auto", None, "/cache/compile"),
    ],
)
def test_compilation_cache_dir(setting, told, expected, monkeypatch):
    monkeypatch.setenv("JAXSCALE_CACHE", "/cache")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", told)
    try:
        folder = meshes.compilation_cache_dir(setting)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (None if folder is None else str(folder)) == expected


def test_prepare_backend_of_a_world_that_jax_finds():
    with pytest.raises(MeshError, match="auto does not say beforehand how many processes share the 8 emulated devices"):
        meshes.prepare_backend(config(devices=8), None)
    code = """
prepare_backend(config(run=RunConfig(compilation_cache="off")), None)
print(json.dumps(dict(gloo=jax.config.jax_cpu_collectives_implementation)))
"""
    assert in_new_process(code) == {"gloo": "gloo"}


def test_prepare_backend_accepts_what_there_is():
    before = jax.config.jax_compilation_cache_dir
    meshes.prepare_backend(config(devices=8, run=RunConfig()), World())
    assert jax.config.jax_compilation_cache_dir == before
    assert jax.device_count() == 8
