"""How long a checkpoint of 400 MB keeps the training loop from its next step.

    .venv/bin/python scripts/bench/checkpoint_blocking.py [--megabytes 400] [--saves 5] [--folder DIR]

A loop of donated matmul steps on 8 emulated devices saves every few steps and runs the same number without saving, in
alternation. Printed: how long `offer()` blocks (median, worst), the step right after it, the other steps while the save
is written, and the step without saving. To reach: `offer()` at most 60 ms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.checkpoint.durable import DurableCheckpoints, load_orbax
from jaxscale.mesh import emulation_flags
from jaxscale.train.protocols import Record

LIMIT_SECONDS = 0.060
ARRAYS = 16
STEPS = 12
"""Steps of one leg, with or without a save at its start."""


def make_state(megabytes: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """ARRAYS float32 matrices of `megabytes` in all, sharded over fsdp, each with its own values."""
    columns = megabytes * 1_000_000 // 4 // ARRAYS // 2048
    sharding = NamedSharding(mesh, P("fsdp"))
    return {f"w{i:02}": jnp.full((2048, columns), float(i + 1), out_sharding=sharding) for i in range(ARRAYS)}


def make_step(mesh: jax.sharding.Mesh) -> tuple[jax.stages.Wrapped, jax.Array]:
    """A step with some matmuls beside an update of the whole state, which it takes over (donation)."""

    def step(state: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        y = x
        for _ in range(4):
            y = jnp.tanh(y @ y.T @ x / 1000)
        return {name: w * 0.999 for name, w in state.items()}, y.sum()

    x = jnp.ones((512, 512), out_sharding=NamedSharding(mesh, P()))
    return jax.jit(step, donate_argnums=0), x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to save; default: a temporary folder")
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = emulation_flags(os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_num_cpu_devices", 8)  # counts where there is nothing but CPUs

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",), axis_types=(AxisType.Explicit,))
    jax.set_mesh(mesh)
    load_orbax()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.megabytes, arguments.saves, mesh)


def measure(folder: Path, megabytes: int, saves: int, mesh: jax.sharding.Mesh) -> None:
    """Alternates legs with and without a save and prints the medians."""
    step, x = make_step(mesh)
    state = make_state(megabytes, mesh)
    total = sum(leaf.nbytes for leaf in state.values())
    checkpoints = DurableCheckpoints(folder, every=1, keep=1)
    state, y = step(state, x)
    jax.block_until_ready((state, y))

    blocked: list[float] = []
    after: list[float] = []
    beside: list[float] = []
    plain: list[float] = []
    whole: list[float] = []
    for number in range(1, saves + 2):  # the first save also builds what later ones reuse, and is not counted
        started = time.perf_counter()
        checkpoints.offer(number, {"params": state}, Record(number, number, {}, {}, {}, {}))
        offered = time.perf_counter()
        times = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            state, y = step(state, x)
            jax.block_until_ready(y)
            times.append(time.perf_counter() - begin)
        checkpoints.close()
        ended = time.perf_counter()
        without = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            state, y = step(state, x)
            jax.block_until_ready(y)
            without.append(time.perf_counter() - begin)
        if number > 1:
            blocked.append(offered - started)
            after.append(times[0])
            beside += times[1:]
            plain += without
            whole.append(ended - started)

    reference = statistics.median(plain)
    kind = jax.devices()[0].device_kind
    print(f"state {total / 1e6:.0f} MB in {ARRAYS} arrays on {mesh.size} {kind} devices; {saves} saves")
    for name, values in (
        ("offer() blocks", blocked),
        ("first step after it", after),
        ("other steps beside the save", beside),
        ("step without saving", plain),
    ):
        median, worst = statistics.median(values) * 1e3, max(values) * 1e3
        print(f"{name:28} median {median:7.1f} ms   worst {worst:7.1f} ms   steps {median / reference / 1e3:5.2f}")
    print(f"{'save, offer to committed':28} median {statistics.median(whole):7.2f} s")
    figure = statistics.median(blocked)
    verdict = "reached" if figure <= LIMIT_SECONDS else "NOT reached"
    limit = f"{LIMIT_SECONDS * 1e3:.0f} ms"
    print(f"figure {figure * 1e3:.1f} ms   to reach {limit}   ratio {figure / LIMIT_SECONDS:.2f}   {verdict}")


if __name__ == "__main__":
    main()
