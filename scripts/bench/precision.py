"""What eight-bit products do to a loss, and what ZeRO levels and offloading do to the bytes of a device.

    python scripts/bench/precision.py                # all rows, some ten minutes on 2 cores
    python scripts/bench/precision.py --rows matmul --steps 100
    python scripts/bench/precision.py --rows state

`matmul` trains lm_tiny on one device with each `precision.matmul`, from the same weights on the same rows, and prints
losses (means over ten steps). `state` prints, of lm_tiny on fsdp 8, the bytes of a device by kind and on its host.
CPUs say nothing about time.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from jaxscale.config import Config, MeshConfig
from jaxscale.data.loader import Loader
from jaxscale.mesh import make_mesh
from jaxscale.ops.quantised import PRODUCTS
from jaxscale.optim.build import make_optimizer
from jaxscale.plan.make import make_plan
from jaxscale.recipe import load_recipe
from jaxscale.state_config import StateConfig
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "lm_tiny.py"
WINDOW = 10
STATES = (StateConfig(1), StateConfig(2), StateConfig(3), StateConfig(3, ("opt",)), StateConfig(3, ("opt", "params")))


def losses(config: Config) -> list[float]:
    """Of each step, on one device."""
    mesh = make_mesh(config, jax.devices()[:1])
    found = []
    with jax.set_mesh(mesh):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = jax.jit(lambda: init_state(config, task, optimizer))()
        step = make_step(config, task, optimizer)
        with Loader(config, config.model.source(config), mesh) as loader:
            for number, _, _, batch in loader:
                state, metrics = step(state, batch, np.int32(number))
                found.append(float(metrics["loss"]))
    return found


def matmuls(config: Config) -> None:
    """Prints mean losses of ten steps each, by kind of product, and the largest difference to `compute`."""
    ends = list(range(WINDOW, config.steps + 1, max(WINDOW, config.steps // 5)))
    print(f"{'matmul':<10}" + "".join(f"{f'to {end}':>10}" for end in ends) + f"{'at most':>12}")
    reference: list[float] = []
    for name in PRODUCTS:
        found = losses(dataclasses.replace(config, precision=dataclasses.replace(config.precision, matmul=name)))
        means = [float(np.mean(found[end - WINDOW : end])) for end in ends]
        reference = reference or means
        apart = max(abs(a - b) for a, b in zip(means, reference, strict=True))
        print(f"{name:<10}" + "".join(f"{mean:>10.4f}" for mean in means) + f"{apart:>12.4f}", flush=True)


def states(config: Config) -> None:
    """Prints bytes of a device of eight."""
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=8))
    print(f"{'zero':<6}{'offload':<14}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'on its host':>13}")
    for state in STATES:
        plan = make_plan(dataclasses.replace(config, state=state), compiles=False)
        held = "".join(f"{plan.held[kind]:>12,}" for kind in ("parameters", "gradients", "optimizer"))
        print(f"{state.zero:<6}{','.join(state.offload) or '-':<14}{held}{plan.on_host:>13,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=("all", "matmul", "state"), default="all")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    config = dataclasses.replace(load_recipe(RECIPE).config, steps=options.steps)
    if options.rows in ("all", "state"):
        states(config)
    if options.rows in ("all", "matmul"):
        matmuls(config)


if __name__ == "__main__":
    main()
