"""Config and mesh file -> one `jax.sharding.Mesh` of all six axes, ordered so that chatty axes get the fast links.

Sizes and device order are pure functions; `prepare_backend` and `make_mesh` are the only effects. ICI is the fast
network inside a slice, DCN the data-center network between slices. Read next: `axes.py` (rules), then `audit.py`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from jaxscale.axes import AXES, abstract_mesh
from jaxscale.cache import cache_folder
from jaxscale.config import Config
from jaxscale.mesh_file import MeshFile, load_chip, load_mesh_file
from jaxscale.mesh_sizes import MeshError as MeshError
from jaxscale.mesh_sizes import resolve_sizes as resolve_sizes
from jaxscale.train.protocols import World

ONE = World()

EMULATION_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"
"""With this schedule of XLA emulated devices lose one another: all but one wait for ever in a collective, the last has
nothing to run (`scripts/bench/emulated_devices.py`; docs/decisions.md). Without it programs have the same bits."""


def device_order(devices: Sequence[Any], sizes: Mapping[str, int], slices: int = 1) -> np.ndarray:
    """Array of devices of shape (stage, data, fsdp, expert, context, tensor), the data axis outermost across slices.

    `data` index // (data / slices) is the slice; all other axes stay inside one. Inside a slice TPUs follow the torus
    (`mesh_utils.create_device_mesh`) and others their process, so that inner axes have neighbours. Slices are told
    apart by `slice_index` where it differs, else they are emulated by blocks of whole processes. Raises MeshError.
    """
    inner = tuple(sizes[axis] // slices if axis == "data" else sizes[axis] for axis in AXES)
    blocks = [
        # On a 2-D or 3-D torus most shapes need a physical dim split between two axes; whole dims are tried first.
        mesh_utils.create_device_mesh(inner, block, allow_split_physical_axes=block[0].platform == "tpu")
        for block in _blocks(devices, slices)
    ]
    return np.concatenate(blocks, axis=AXES.index("data"))


def prepare_backend(config: Config, world: World | None = ONE) -> None:
    """Sets what must be set before JAX makes its backend: emulated devices, collectives, cache, a mesh file's flags.

    Call it in the worker, before the first array. In a world of several processes emulated devices are dealt out
    equally. `world`: None where JAX finds it, so that its size is not known yet. A backend that exists already is
    accepted when it has the devices. Raises MeshError.
    """
    wanted = _emulated(config)
    if world is None and wanted:
        raise MeshError(
            f"--distributed auto does not say beforehand how many processes share the {wanted} emulated devices; use "
            f"--distributed ADDRESS,N,I, or drop --devices and run on the cluster's own"
        )
    processes = world.processes if world is not None else 0
    if wanted and wanted % processes:
        raise MeshError(
            f"{wanted} emulated devices cannot be dealt out to {processes} processes; use a multiple of {processes}"
        )
    for name, value in (load_mesh_file(config.on).environment if config.on else {}).items():
        os.environ.setdefault(name, value)
    if wanted:
        _emulate(wanted // processes, spare_is_fine=processes == 1)
    if world != ONE:
        # Read by the CPU backend only; other backends bring their own collectives.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _set_compilation_cache(config.run.compilation_cache)


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the run: Explicit axes, all six, in `axes.AXES` order. Makes the backend.

    `devices`: default all there are, or the first of them where `--devices` or a CPU mesh file wants fewer.
    Raises MeshError when the devices are not the ones the config names.
    """
    try:
        devices = list(jax.devices()) if devices is None else list(devices)
    except RuntimeError as error:
        raise MeshError(
            f"JAX has no devices: {error}; another process may hold them, or set JAX_PLATFORMS=cpu to train on the CPU"
        ) from error
    file = load_mesh_file(config.on) if config.on else None
    devices = _checked(devices, config, file)
    slices = file.slices if file else _slices(devices)
    sizes = resolve_sizes(config.mesh, len(devices), slices, file.axes if file else None)
    return Mesh(device_order(devices, sizes, slices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def mesh_sizes_for(config: Config) -> dict[str, int]:
    """Axis sizes of a config without any device: of its mesh file, of `--devices`, or of the axes it sets."""
    file = load_mesh_file(config.on) if config.on else None
    given = dataclasses.asdict(config.mesh)
    devices = config.devices or (file.devices if file else math.prod(size or 1 for size in given.values()))
    return resolve_sizes(config.mesh, devices, file.slices if file else 1, file.axes if file else None)


def abstract_mesh_for(config: Config) -> AbstractMesh:
    """A mesh without devices, to lower this config's programs on a machine that has none of them.

    It knows the platform of the config's mesh file, by which attention chooses its kernel.
    """
    chip = load_chip(load_mesh_file(config.on).chip) if config.on else None
    device = AbstractDevice(chip.device_kinds[0], None, chip.platform) if chip is not None else None
    return abstract_mesh(mesh_sizes_for(config), device)


def mesh_sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Axis sizes of a mesh as a plain dict, in `axes.AXES` order."""
    return {axis: mesh.shape[axis] for axis in AXES}


def describe(mesh: Mesh) -> str:
    """One line for the start summary: `8 cpu devices: data 2 x fsdp 4`, with processes where there are several."""
    devices = list(mesh.devices.flat)
    processes = len({device.process_index for device in devices})
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh_sizes(mesh).items() if size > 1) or "every axis 1"
    plural = "" if len(devices) == 1 else "s"
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{len(devices)} {devices[0].device_kind} device{plural}{where}: {axes}"


def compilation_cache_dir(setting: str) -> Path | None:
    """Folder of compiled programs for `run.compilation_cache`: `off` (None), a path, or `auto`.

    `auto` is the folder that JAX was already told (`JAX_COMPILATION_CACHE_DIR`), else one in the user's cache folder,
    which `JAXSCALE_CACHE` moves.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    return cache_folder("compile")


def _emulate(count: int, spare_is_fine: bool) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # A backend exists already and has another count.
        there = jax.local_device_count()
        if there == count or (there > count and spare_is_fine):
            return
        raise MeshError(
            f"{count} emulated devices are wanted in this process, but JAX already runs with {there} and cannot change "
            f"that; call prepare_backend before anything makes an array, or start a new process"
        ) from error
    os.environ["XLA_FLAGS"] = emulation_flags(os.environ.get("XLA_FLAGS", ""))


def emulation_flags(flags: str) -> str:
    """`XLA_FLAGS` with the one that emulated devices need, unless it is there already, with either value."""
    return flags if EMULATION_FLAG in flags else f"{flags} {EMULATION_FLAG}=false".strip()


def _set_compilation_cache(setting: str) -> None:
    folder = compilation_cache_dir(setting)
    jax.config.update("jax_enable_compilation_cache", folder is not None)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # By default only programs that took a second are kept; a warm start is many small ones.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _emulated(config: Config) -> int:
    """CPU devices the config asks to emulate, over all processes; 0 = it does not say."""
    if not config.on:
        return config.devices
    file = load_mesh_file(config.on)
    if load_chip(file.chip).platform == "cpu":
        return config.devices or file.devices
    if config.devices:
        raise MeshError(
            f"--devices {config.devices} emulates CPU devices, but --on {file.name} is {file.devices} {file.chip} "
            f"devices; drop one of the two"
        )
    return 0


def _checked(devices: list[jax.Device], config: Config, file: MeshFile | None) -> list[jax.Device]:
    """The devices to use, if they are what the config names."""
    here = f"{len(devices)} {devices[0].device_kind} devices"
    wanted = _emulated(config)
    if wanted:
        name = f"--on {config.on}" if config.on and not config.devices else f"--devices {config.devices}"
        if devices[0].platform != "cpu":
            raise MeshError(
                f"{name} emulates CPU devices, but JAX runs on {here}; set JAX_PLATFORMS=cpu, or drop the flag"
            )
        one_process = len({device.process_index for device in devices}) == 1
        if len(devices) < wanted or (len(devices) > wanted and not one_process):
            raise MeshError(
                f"{name} wants {wanted} CPU devices, but JAX has {here}; call prepare_backend before the first array"
            )
        return devices[:wanted]
    if file is not None:
        chip = load_chip(file.chip)
        kinds = {device.device_kind for device in devices}
        if not all(chip.is_kind(kind) for kind in kinds) or len(devices) != file.devices:
            raise MeshError(
                f"--on {file.name} is {file.devices} devices of chip {chip.name} ({' or '.join(chip.device_kinds)}), "
                f"but JAX runs on {here}; start it on that machine, or drop --on to use what is here"
            )
    return devices


def _slices(devices: Sequence[Any]) -> int:
    # GPUs and CPUs carry a slice_index too, but it tells apart hosts; there a mesh file or mesh.data says what to do.
    return len({device.slice_index for device in devices}) if devices[0].platform == "tpu" else 1


def _blocks(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """Devices by slice, each block sorted by process and id."""
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    found = [d.slice_index for d in ordered if hasattr(d, "slice_index")]
    counts = {index: found.count(index) for index in dict.fromkeys(found)}
    if slices > 1 and len(counts) > 1 and (len(counts) != slices or len(set(counts.values())) > 1):
        listed = ", ".join(f"slice {index}: {count}" for index, count in counts.items())
        raise MeshError(
            f"{slices} equal slices are expected, but the devices are {listed}; name a mesh file that matches"
        )
    size = len(ordered) // slices
    blocks = [ordered[i * size : (i + 1) * size] for i in range(slices)]
    shared = {d.process_index for d in blocks[0]}.intersection(d.process_index for block in blocks[1:] for d in block)
    processes = len({d.process_index for d in ordered})
    if processes > 1 and shared and slices % processes:
        raise MeshError(
            f"{processes} processes cannot be {slices} slices of whole processes; use a multiple of {slices} processes"
        )
    return blocks
