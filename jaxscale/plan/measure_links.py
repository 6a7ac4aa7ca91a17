"""Measures the collectives of a mesh, and keeps what they say of its links in a TOML file.

Read next: `collective_costs.py`.
"""

from __future__ import annotations

import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxscale.axes import AXES
from jaxscale.config_error import ConfigError
from jaxscale.plan.collective_costs import Link, fit

Point = tuple[str, float, float]
"""Kind, bytes of the larger side on one device, seconds."""

BODIES: dict[str, Callable[[jax.Array, str], jax.Array]] = {
    "all-reduce": jax.lax.psum,
    "all-gather": lambda x, axis: jax.lax.all_gather(x, axis, axis=1, tiled=True),
    "reduce-scatter": lambda x, axis: jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True),
    "all-to-all": lambda x, axis: jax.lax.all_to_all(x, axis, 1, 1, tiled=True),
    "collective-permute": lambda x, axis: jax.lax.ppermute(
        x, axis, [(i, (i + 1) % jax.lax.axis_size(axis)) for i in range(jax.lax.axis_size(axis))]
    ),
}
"""By kind, on (1, numbers) of one device."""


def measure(mesh: Mesh, axis: str, kinds: Sequence[str], sizes: Sequence[int], rounds: int) -> Iterator[Point]:
    """Medians of `rounds` runs of each kind and size over one axis; all groups of devices along it work at once.

    All processes of a world call this; the first run of each, which compiles, is not counted.
    """
    count = mesh.shape[axis]
    with jax.set_mesh(mesh):
        for kind in kinds:
            for size in sizes:
                # Float32 numbers, as many as every device of the axis can have a part of.
                numbers = max(1, round(size / 4 / count)) * count
                given = numbers // count if kind == "all-gather" else numbers
                x = jax.jit(lambda n=given: jnp.ones((mesh.size, n), out_sharding=P(AXES, None)))()
                body = jax.shard_map(
                    lambda x, kind=kind: BODIES[kind](x, axis), in_specs=P(AXES), out_specs=P(AXES), check_vma=False
                )
                program = jax.jit(body).lower(x).compile()
                jax.block_until_ready(program(x))
                took = []
                for _ in range(rounds):
                    begin = time.perf_counter()
                    jax.block_until_ready(program(x))
                    took.append(time.perf_counter() - begin)
                yield kind, 4.0 * numbers, statistics.median(took)


def links_text(name: str, points: dict[str, list[Point]], sizes: dict[str, int]) -> str:
    """The TOML of a mesh's links: what was fitted for each axis, and what was measured."""
    lines = [f"# Links of {name}, by `jaxscale bench collectives`: a message of n bytes takes latency + n / bandwidth."]
    for axis, found in points.items():
        link = fit(found, sizes[axis])
        lines += [f"[{axis}]", f"devices = {sizes[axis]}", f"latency_seconds = {link.latency:.6g}"]
        lines.append(f"bandwidth_bytes_per_second = {link.bandwidth:.6g}")
        lines += [f"[{axis}.measured]  # bytes on a device, seconds"]
        for kind in dict.fromkeys(kind for kind, _, _ in found):
            pairs = ", ".join(f"[{nbytes:.0f}, {took:.6g}]" for k, nbytes, took in found if k == kind)
            lines.append(f"{kind} = [{pairs}]")
    return "\n".join(lines) + "\n"


def load_links(path: Path) -> dict[str, Link]:
    """Axis -> link of a file that `jaxscale bench collectives` wrote. Raises ConfigError where it is none."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text())
        return {
            axis: Link(float(entry["latency_seconds"]), float(entry["bandwidth_bytes_per_second"]))
            for axis, entry in table.items()
        }
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} says nothing of links ({error}); write it with: jaxscale bench collectives --on MESH --out {path}"
        ) from error
