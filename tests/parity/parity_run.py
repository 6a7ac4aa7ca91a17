"""Five steps of `lm_parity`, of another recipe or of a variant of it on some mesh: what the parity tests compare.

Also run as one process of a world:

python parity_run.py ADDRESS,N,I OUT '{"sizes": {...}, "changes": {...}}'
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxscale import axes, tree
from jaxscale.config import Config, OptimConfig, RematConfig
from jaxscale.data.corpora import open_corpora
from jaxscale.data.loader import Loader
from jaxscale.optim.build import make_optimizer
from jaxscale.recipe import load_recipe
from jaxscale.train.accumulate import loss_and_gradients
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 5


VARIANTS: dict[str, dict[str, Any]] = {
    "lm_parity": {},
    "everything": {
        "layers": 4, "tied": True, "qk_norm": True, "window": (16, 0), "attention_softcap": 4.0, "logit_softcap": 8.0,
    },
    "deep": {"layers": 4},
}  # fmt: skip
"""What a variant changes in the model of `lm_parity`."""


def parity_config(
    optimizer: str = "adamw",
    microbatches: int = 1,
    remat: str = "none",
    variant: str = "lm_parity",
    recipe: str = "lm_parity",
) -> Config:
    config = load_recipe(ROOT / "recipes" / f"{recipe}.py").config
    rate = 1e-3 if optimizer == "adamw" else 0.1
    return dataclasses.replace(
        config,
        steps=STEPS,
        model=dataclasses.replace(config.model, **VARIANTS[variant]),
        optim=OptimConfig(name=optimizer, learning_rate=rate, schedule="constant"),
        train=dataclasses.replace(config.train, microbatches=microbatches),
        remat=RematConfig(policy=remat),
    )


def mesh_of(sizes: dict[str, int]) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values()))) if sizes else 1
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:count])


@jax.jit
def ragged(batch):
    """Rows with between a fifth and all of their tokens counted: a mean of means would show at once."""
    share = 1 + batch["row"].astype(jnp.int32)[:, None] % 5
    position = jax.lax.broadcasted_iota(jnp.int32, batch["tokens"].shape, 1)
    kept = (position * 7 + share) % 5 < jax.reshard(share, axes.spec("act_batch", None))
    return {**batch, "loss_weight": batch["loss_weight"] * jax.reshard(kept, axes.spec("act_batch", "act_sequence"))}


def parity_run(config: Config, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Path -> values: initial parameters (`init/`), gradients of step 1 (`grad/`), `losses` and `norms` of steps."""
    mesh = mesh_of(sizes)
    out: dict[str, np.ndarray] = {}

    def collect(prefix, values):
        layout = task.stored_layout
        for path, leaf in tree.flatten(jax.jit(layout.store)(values) if layout is not None else values).items():
            whole = multihost_utils.process_allgather(leaf, tiled=True) if mesh.is_multi_process else leaf
            out[prefix + path] = np.asarray(whole)

    with jax.set_mesh(mesh):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = jax.jit(lambda: init_state(config, task, optimizer))()
        collect("init/", state["params"])
        step, losses, norms = make_step(config, task, optimizer), [], []
        with Loader(config, open_corpora(config), mesh) as loader:
            for number, _, _, batch in loader:
                batch = ragged(batch)
                if number == 0:
                    key = jax.random.key(0)
                    parts = config.train.microbatches
                    gradients = jax.jit(lambda p, b, k, n=parts: loss_and_gradients(task, p, b, k, n, False)[1])
                    collect("grad/", gradients(state["params"], batch, key))
                state, metrics = step(state, batch, np.int32(number))
                losses.append(float(metrics["loss"]))
                norms.append(float(metrics["grad_norm"]))
    return {**out, "losses": np.array(losses), "norms": np.array(norms)}


def main() -> None:
    from jaxscale.world import membership, parse_distributed

    place, target, request = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with membership(parse_distributed(place)) as world:
        result = parity_run(parity_config(**request["changes"]), request["sizes"])
        if world.is_writer:
            np.savez(target, **result)


def assert_same(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """Two runs have the same weights at the start, gradients, norms and losses."""
    paths = [path for path in reference if path.startswith("grad/")]
    assert len(paths) > 10
    assert result.keys() == reference.keys()
    for path in paths:
        norm = np.linalg.norm(reference[path])
        assert norm > 0, path
        assert np.linalg.norm(result[path] - reference[path]) <= 1e-5 * norm, path
    for path in reference:
        if path.startswith("init/"):
            np.testing.assert_array_equal(result[path], reference[path], err_msg=path)
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-6)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=1e-5)


if __name__ == "__main__":
    main()
