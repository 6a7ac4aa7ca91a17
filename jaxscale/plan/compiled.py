"""Compiles the very step that `train` runs for machines that are not here, with the TPU's own compiler.

The compiler (the `tpu` extra) needs no TPU: it is told a topology. What it gave is kept by the hash of program, flags
and versions, so that asking again costs no compilation. Read next: `program_text.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxscale import audit, jax_private
from jaxscale.axes import AXES
from jaxscale.cache import cache_folder
from jaxscale.config import Config, ConfigError
from jaxscale.mesh import device_order, mesh_sizes, mesh_sizes_for
from jaxscale.mesh_file import MeshFile, load_chip, load_mesh_file
from jaxscale.optim.build import make_optimizer
from jaxscale.train.hooks import abstract_batches
from jaxscale.train.state import abstract_state
from jaxscale.train.step import make_step

FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
"""Environment variables that change what the compiler does."""

FORMAT = "2"
"""Of what is kept of a compiled program; what has another one is compiled again."""

ELSEWHERE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "none"}
"""Else the compiler asks Google's cloud which machine this is, and complains at length where there is no answer."""


class PlanError(ConfigError):
    """What was asked for cannot be planned. The message says what to change."""


@dataclass(frozen=True)
class CompiledStep:
    """A compiled training step, as text and figures."""

    text: str
    """Scheduled HLO."""
    arguments: int
    """Bytes on each device: state and batch."""
    outputs: int
    """Of results that take the place of no argument."""
    aliased: int
    """Of results that take the place of an argument: what is donated."""
    temporaries: int
    """What the compiler says of everything between; parts that are not needed at once count more than once."""
    peak: int
    """The most that is in use at once, arguments included; 0 = the compiler does not say."""
    code: int
    host: int
    """In the host's memory, for what is offloaded there."""
    seconds: float
    """That it took to compile, when it was."""
    cached: bool

    @property
    def device_bytes(self) -> int:
        """Everything that a device must hold at once."""
        used = self.peak or self.arguments + self.outputs + self.temporaries
        return used + self.code


def topology_mesh(config: Config) -> Mesh:
    """The mesh of a config on the devices of its mesh file's topology, which need not exist. Raises PlanError."""
    if not config.on:
        raise PlanError("--compile needs a machine to compile for; name its mesh file, for example --on v5e-256")
    file = load_mesh_file(config.on)
    if not file.topology:
        raise PlanError(
            f"mesh file {config.on!r} names no topology, so nobody knows what to compile for; TPU slices have one"
        )
    for name, value in file.environment.items():
        os.environ.setdefault(name, value)
    devices = _devices(file)
    sizes = mesh_sizes_for(config)
    return Mesh(device_order(devices, sizes, file.slices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def compile_step(config: Config, mesh: Mesh) -> CompiledStep:
    """The training step of `config` for `mesh`. Raises AuditError where the model does not go with it, PlanError where
    the compiler refuses the program.
    """
    with jax.set_mesh(mesh):
        platform = mesh.devices.flat[0].platform
        config.model.check(config, platform)
        task = config.model.task(config)
        audit.audit(task.parameters, mesh_sizes(mesh), config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = abstract_state(config, task, optimizer)
        step = jax.ShapeDtypeStruct((), np.int32)
        traced = make_step(config, task, optimizer).trace(state, whole_batch(config, mesh), step)  # type: ignore[attr-defined]  # jitted
        lowered = traced.lower(lowering_platforms=(platform,))
        return _compiled(lowered, mesh)


def whole_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The first phase's batch of a step, all microbatches of it, padded to the mesh."""
    part, parts = abstract_batches(config, mesh)[0], config.train.microbatches
    return {
        name: jax.ShapeDtypeStruct((one.shape[0] * parts, *one.shape[1:]), one.dtype, sharding=one.sharding)
        for name, one in part.items()
    }


def _devices(file: MeshFile) -> list[Any]:
    from jax.experimental import topologies

    if load_chip(file.chip).platform != "tpu":
        raise PlanError(f"mesh file {file.name!r} is of {file.chip} devices, and only TPU compilers work without one")
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise PlanError(
            "--compile needs the TPU's compiler, which is not installed: pip install 'jaxscale[tpu]'"
        ) from None
    for name, value in ELSEWHERE.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": file.slices} if file.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(file.topology, platform="tpu", **more).devices)
    except Exception as error:
        raise PlanError(
            f"libtpu {version} knows no topology {file.topology!r} of {file.slices} slices, as mesh file {file.name!r} "
            f"has it: {str(error).splitlines()[0]}"
        ) from error


def _compiled(lowered: Any, mesh: Mesh) -> CompiledStep:
    folder = cache_folder("plans") / _key(lowered.as_text(), mesh)
    if (folder / "memory.json").exists():
        text = gzip.decompress((folder / "program.hlo.gz").read_bytes()).decode()
        return CompiledStep(text=text, cached=True, **json.loads((folder / "memory.json").read_text()))
    began = time.monotonic()
    try:
        with jax_private.without_compilation_cache():  # it cannot load programs for devices that are not here
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(f"the compiler refuses this program: {_reason(str(error))}") from error
    seconds = round(time.monotonic() - began, 1)
    memory = compiled.memory_analysis()
    figures = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        "seconds": seconds,
    }
    text = compiled.as_text()
    _keep(folder, text, figures)
    return CompiledStep(text=text, cached=False, **figures)


def _reason(text: str) -> str:
    """What a compiler's message says to people: of a program that is too large, by how much."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wanted = [line for line in lines if "hbm" in line.lower() and ("exceed" in line.lower() or "used" in line.lower())]
    return (wanted or lines or ["no reason given"])[0]


def _key(program: str, mesh: Mesh) -> str:
    device = mesh.devices.flat[0]
    versions = [importlib.metadata.version(name) for name in ("jaxlib", "libtpu")]
    flags = [f"{name}={os.environ.get(name, '')}" for name in FLAGS]
    parts = [FORMAT, program, device.device_kind, str(dict(mesh.shape)), *versions, *flags]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _keep(folder: Path, text: str, figures: dict[str, Any]) -> None:
    """Both files; the small one last, by which the other is known to be whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("program.hlo.gz", gzip.compress(text.encode())),
        ("memory.json", json.dumps(figures).encode()),
    ):
        fresh = folder / f".{name}.{os.getpid()}"
        fresh.write_bytes(content)
        fresh.replace(folder / name)
