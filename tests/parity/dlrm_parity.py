"""Five steps of a small recommendation model on some mesh: what its parity tests compare. Float32 throughout."""

import dataclasses

import jax
import numpy as np

from jaxscale import axes, tree
from jaxscale.config import CheckpointConfig, Config, DataConfig, OptimConfig, PrecisionConfig, TrainConfig
from jaxscale.data.loader import Loader
from jaxscale.models.dlrm_config import DlrmConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

STEPS = 5
TABLES, HOTS = (700, 40, 3, 250, 9), (1, 3, 2, 1, 1)
PLACEMENTS = {
    "row": ("row",),
    "column": ("column",),
    "table": ("table",),
    "mixed": ("row", "column", "table", "row", "table"),
}


def dlrm_config(placement: str = "row", microbatches: int = 1, **model) -> Config:
    shape = {"dense": 5, "width": 16, "bottom": (16,), "top": (32, 16), "table_learning_rate": 0.1}
    return Config(
        name="dlrm_parity",
        model=DlrmConfig(tables=TABLES, hots=HOTS, placement=PLACEMENTS[placement], **(shape | model)),
        steps=STEPS,
        data=DataConfig(path="builtin:400", batch=24, held_out_documents=60),
        optim=OptimConfig(name="sgd", learning_rate=0.1, momentum=0.0, schedule="constant", weight_decay=0.0, clip=0.5),
        train=TrainConfig(microbatches=microbatches),
        precision=PrecisionConfig(compute="float32"),
        checkpoint=CheckpointConfig(every=3),
    )


def mesh_of(sizes: dict[str, int]) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values()))) if sizes else 1
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:count])


def dlrm_run(config: Config, sizes: dict[str, int], change=lambda batch, _: batch) -> dict[str, np.ndarray]:
    """Path -> values: `init/` and `end/` of the whole state, and lists of metrics by name.

    change: of each batch before its step.
    """
    mesh, out = mesh_of(sizes), {}
    with jax.set_mesh(mesh):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = jax.jit(lambda: init_state(config, task, optimizer))()
        out |= {f"init/{path}": np.asarray(leaf) for path, leaf in tree.flatten(state).items()}
        step, lines = make_step(config, task, optimizer), []
        with Loader(config, config.model.source(config), mesh) as loader:
            for number, _, _, batch in loader:
                state, metrics = step(state, change(batch, number), np.int32(number))
                lines.append({name: float(value) for name, value in metrics.items()})
        out |= {f"end/{path}": np.asarray(leaf) for path, leaf in tree.flatten(state).items()}
    return out | {name: np.array([line[name] for line in lines]) for name in lines[0]}


def with_rounds(config: Config) -> Config:
    """The same with room for so few ids a round that an exchange takes several."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, exchange=0.3))
