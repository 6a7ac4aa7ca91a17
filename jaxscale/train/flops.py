"""Model FLOPs utilisation (MFU): the share of the chips' peak that the model's own arithmetic uses.

MFU counts the model's FLOPs, not what is recomputed (PaLM, appendix B). A TPU's or GPU's peak is a published figure in
`meshes/chips.toml`; a CPU's is measured once by a matmul and remembered. Read next: `display.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxscale.cache import cache_folder
from jaxscale.mesh_file import chip_of

_SIDES = (1024, 2048)
_BUDGET_SECONDS = 0.15
"""No new matmul is begun after this; the largest one takes about as long again on a slow machine."""
_REPEATS = 2


def model_flops_utilisation(flops: float, seconds: float, peak: float | None) -> float | None:
    """`flops` done in `seconds` as a share of `peak` FLOP/s of all devices; None where the peak is not known."""
    return flops / seconds / peak if peak and seconds > 0 else None


def peak_flops(devices: Sequence[jax.Device], dtype: str) -> float | None:
    """Peak FLOP/s of all `devices` together for matmuls of `dtype`; None where chips.toml does not know the chip.

    Emulated CPU devices share the machine's cores: a process's devices together have one measured peak. Raises
    MeshFileError where the chip has no figure for the dtype.
    """
    chip = chip_of(devices[0])
    if chip is None:
        return None
    if not chip.is_measured:
        return len(devices) * chip.peak_flops(dtype)
    # The processes of an emulated world share one machine too; real CPU clusters are not what MFU is read on.
    return cpu_peak_flops(dtype)


def cpu_peak_flops(dtype: str) -> float:
    """FLOP/s of this machine's best matmul over all its cores: from the cache folder, else measured in under 0.5 s."""
    path = cache_folder("cpu_peak.json")
    key = f"{_cpu_name()}, {os.cpu_count()} cores, jax {jax.__version__}, {dtype}"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):  # no cache yet, or a torn one: measure again
        known = json.loads(path.read_text())
    if key not in known:
        known[key] = measure_matmul_flops(dtype)
        with contextlib.suppress(OSError):  # a read-only home costs the measurement at every start, no more
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}")
            fresh.write_text(json.dumps(known, indent=1))
            fresh.replace(path)
    return known[key]


def measure_matmul_flops(dtype: str) -> float:
    """Best FLOP/s of square matmuls on the first CPU device, whose thread pool spans all cores."""
    start, best = time.perf_counter(), 0.0
    device = jax.local_devices(backend="cpu")[0]
    multiply = jax.jit(jnp.matmul)
    # A mesh of its own: the run's mesh may be set already, and would want all of its devices.
    with jax.set_mesh(Mesh(np.array([device]), ("one",))):
        for side in _SIDES:
            if time.perf_counter() - start > _BUDGET_SECONDS:
                break
            x = jax.device_put(np.ones((side, side), dtype), device)
            multiply(x, x).block_until_ready()  # compiles
            begin, worked = time.perf_counter(), time.process_time()
            for _ in range(_REPEATS):
                multiply(x, x).block_until_ready()
            wall, worked = time.perf_counter() - begin, time.process_time() - worked
            best = max(best, whole_machine_flops(_REPEATS * 2 * side**3, wall, worked, os.cpu_count() or 1))
    return best


def whole_machine_flops(flops: float, wall: float, worked: float, cores: int) -> float:
    """FLOP/s of all cores, from `flops` done in `wall` seconds with `worked` seconds of processor time.

    Where other programs had a part of the cores' time, this one's own tells what it would have done with all of it.
    """
    return flops / min(wall, worked / cores) if worked > 0 else flops / wall


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:  # Linux; elsewhere the platform's word for it
        for line in lines:
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
