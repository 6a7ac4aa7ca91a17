"""`jaxscale bench collectives --on MESH`: latency and bandwidth of each mesh axis, measured on the devices there are.

Read next: `../plan/measure_links.py`, then `../plan/collective_costs.py`, which says what the figures are good for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxscale.cache import cache_folder
from jaxscale.commands.parse import UsageError, parse
from jaxscale.config import Config, MeshConfig, ModelConfig
from jaxscale.config_error import require

COLLECTIVES = "collectives"
EXAMPLES = """\
  every axis of the machine that this runs on:
    jaxscale bench collectives --on v5e-256
  how it looks, on eight emulated devices:
    jaxscale bench collectives --devices 8 --mesh.data 2
  between two hosts, one process on each:
    jaxscale bench collectives --distributed 10.0.0.1:8476,2,0 --mesh.data 2      (and 2,1 on the other)
Each line is a collective over one axis: bytes of its larger side on a device (what a gather gives, what a scatter
takes), median seconds, and what the fitted line makes of it. The fit is a line in messages and bytes, by least squares
of relative errors: a ring of p devices sends 2 (p - 1) messages for an all-reduce, p - 1 for the others, 1 to permute.
The file has a table for each axis; `jaxscale.plan.collective_costs` computes with it."""


@dataclass(frozen=True)
class BenchCommand:
    """Flags of `bench collectives`."""

    on: str = ""
    """Mesh file: a name in meshes/ (`v5e-256`) or a path; empty: the devices there are."""
    devices: int = 0
    """Emulate this many CPU devices; 0 = what there is (or what `on` says)."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: str = ""
    """ADDRESS,N,I: this is process I of N; or `auto` on TPU pods, Slurm and the like."""
    kinds: tuple[Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"], ...] = (
        *("all-reduce", "all-gather", "reduce-scatter"),
        *("all-to-all", "collective-permute"),
    )
    """Collectives to measure."""
    sizes: tuple[int, ...] = (1024, 16384, 262144, 4194304)
    """Bytes on each device; at least two, of which one is small, or latency and bandwidth cannot be told apart."""
    rounds: int = 20
    """Runs of each, of which the median counts."""
    out: str = ""
    """File to write; empty: beside a mesh file given by its path, else in the user's cache folder."""

    def __post_init__(self) -> None:
        require(len(set(self.sizes)) >= 2, f"--sizes is {self.sizes}; two sizes or more tell latency from bandwidth")
        require(min(self.sizes) >= 4, f"--sizes has {min(self.sizes)}; a message has at least 4 bytes, one number")
        require(max(self.sizes) <= 1 << 32, f"--sizes has {max(self.sizes)} bytes; use at most {1 << 32}")
        require(self.rounds >= 1, f"--rounds is {self.rounds}; use 1 or more")
        require(bool(self.kinds), "--kinds names no collective; leave it away to measure all of them")


def run_bench(args: Sequence[str], prog: str | None = None) -> int:
    """Measures, prints and writes. Raises ConfigError for what cannot be measured."""
    usage = f"usage: jaxscale bench {COLLECTIVES} [--on MESH] [options]\n\nexamples:\n{EXAMPLES}"
    if not args or args[0] in ("-h", "--help"):
        print(usage)
        return 0 if args else 2
    if args[0] != COLLECTIVES:
        raise UsageError(f"there is no bench {args[0]!r}; there is one: jaxscale bench {COLLECTIVES} --on MESH")
    command = parse(
        BenchCommand,
        args[1:],
        prog=prog or f"jaxscale bench {COLLECTIVES}",
        description="Latency and bandwidth of each mesh axis, measured by the collectives of training.",
        examples=EXAMPLES,
        default=BenchCommand(),
    )
    config = Config("bench", ModelConfig(), on=command.on, devices=command.devices, mesh=command.mesh)
    from jaxscale.mesh import prepare_backend
    from jaxscale.world import membership, parse_distributed

    world = parse_distributed(command.distributed)
    prepare_backend(config, world)
    with membership(world) as joined:
        return _measure(command, config, joined.is_writer)


def _measure(command: BenchCommand, config: Config, speaks: bool) -> int:
    from jaxscale.mesh import describe, make_mesh, mesh_sizes
    from jaxscale.plan.collective_costs import fit, seconds
    from jaxscale.plan.measure_links import Point, links_text, measure

    mesh = make_mesh(config)
    sizes = {axis: size for axis, size in mesh_sizes(mesh).items() if size > 1}
    require(
        bool(sizes),
        "there is one device, and collectives need two: run it where there are more, or emulate them (--devices 8 "
        "--mesh.data 2)",
    )
    points: dict[str, list[Point]] = {}
    if speaks:
        print(describe(mesh))
    for axis, count in sizes.items():
        points[axis] = list(measure(mesh, axis, command.kinds, command.sizes, command.rounds))
        link = fit(points[axis], count)
        if speaks:
            print(f"{axis} ({count}): latency {link.latency * 1e6:.1f} us, bandwidth {link.bandwidth / 1e9:.3f} GB/s")
            for kind, nbytes, took in points[axis]:
                fitted = seconds(kind, nbytes, count, link)
                print(f"  {kind:<19}{nbytes:>12,.0f} B {took * 1e6:>12.1f} us   fitted {fitted * 1e6:.1f}")
    if speaks:
        path = Path(command.out) if command.out else _default_path(command.on)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(links_text(command.on or describe(mesh), points, sizes))
        print(f"written to {path}")
    return 0


def _default_path(on: str) -> Path:
    if on.endswith(".toml"):
        return Path(on).with_suffix(".links.toml")
    return cache_folder("links") / f"{on or 'here'}.links.toml"
