"""A run directory -> what generates: the task, its weights on a mesh, the tokenizer. Read next: `text.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import axes, tree
from jaxscale.audit import audit
from jaxscale.checkpoint.layout import list_steps, read_record, step_folder
from jaxscale.checkpoint.restore import restore_params
from jaxscale.checkpoint.stored_layout import loaded
from jaxscale.config import Config, MeshConfig
from jaxscale.config_file import config_from_dict
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer
from jaxscale.generate.sample import GenerateError
from jaxscale.mesh import make_mesh, mesh_sizes, prepare_backend
from jaxscale.task import Params, Task


@dataclass(frozen=True)
class LoadedRun:
    """A trained model. `params` lie on `mesh`, matrices in the compute dtype."""

    config: Config
    """Of the checkpoint, with the mesh it was loaded onto."""
    step: int
    task: Task
    params: Params
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh


def find_step(run: Path, step: int | None) -> int:
    """The step to load: `step`, or the newest if None. Raises GenerateError for what is no run or has no such step."""
    if not (run / "config.json").is_file():
        what = "has no config.json" if run.is_dir() else "is not there" if not run.exists() else "is a file"
        raise GenerateError(f"{run} is not a run directory: it {what}; give the --run.dir of a training run")
    steps = list_steps(run / "checkpoints")
    if not steps:
        raise GenerateError(
            f"{run} has no checkpoint yet; one is saved every checkpoint.every steps, at the end, and when the run is "
            "stopped by Ctrl-C"
        )
    if step is not None and step not in steps:
        raise GenerateError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def load_run(run: Path, step: int, *, on: str, devices: int, mesh: MeshConfig) -> LoadedRun:
    """Loads a step's weights onto the mesh that `on`, `devices` and `mesh` say, as in a run: all devices by default.

    The moving average of the weights is taken where the run kept one. Makes the backend. Raises ConfigError and its
    like for a mesh or a config that cannot work, DataError for the tokenizer, DamagedCheckpoint for the checkpoint.
    """
    folder = step_folder(run / "checkpoints", step)
    config = config_from_dict(read_record(folder).config, f"{folder / 'config.json'}")
    if config.model.unit != "tokens":
        raise GenerateError(f"{run} trained a {type(config.model).__name__}, a model of {config.model.unit}: no text")
    tokenizer = load_tokenizer(run / "tokenizer")
    config = replace(config, on=on, devices=devices, mesh=mesh)
    prepare_backend(config)
    made = make_mesh(config)
    with jax.set_mesh(made):
        task = config.model.task(config)
        audit(task.parameters, mesh_sizes(made), _with_fitting_rows(config, mesh_sizes(made)))
        average = bool(config.optim.ema)
        abstract = jax.eval_shape(task.init, jax.random.key(0))
        if average:  # kept in float32 whatever the weights are
            abstract = jax.tree.map(lambda x: x.update(dtype=jnp.float32), abstract)

        def load(stored: Mapping[str, Any]) -> dict[str, Any]:
            return {"params": restore_params(run / "checkpoints", step, stored["params"], average=average)}

        params = loaded(task.stored_layout, {"params": abstract}, load)["params"]
        params = _in_compute_dtype(config, task)(params)
    return LoadedRun(config, step, task, params, tokenizer, made)


def _with_fitting_rows(config: Config, sizes: dict[str, int]) -> Config:
    """The config as the audit shall see it: generation brings rows of its own, whatever the training's were."""
    shards = 1
    for axis in axes.mesh_axes("act_residual_sequence"):
        shards *= sizes[axis]
    return replace(config, phases=(), data=replace(config.data, sequence=2 * shards))


def _in_compute_dtype(config: Config, task: Task) -> Callable[[Params], Params]:
    """Casts every matrix once, as each layer would at each token; norms and routers work in float32 and stay."""
    stays = {path for path, parameter in task.parameters.items() if {"norm", "router"} & set(parameter.axes)}

    def cast(params: Params) -> Params:
        dtype = jnp.dtype(config.precision.compute)
        return tree.map_paths(lambda path, x: x if path in stays else x.astype(dtype), params)

    return jax.jit(cast, donate_argnums=0)
