"""Compiles the programs of the next smaller world from inside the running one, so that a shrink compiles nothing.

Each worker compiles what any rank of the smaller world will run, over the first devices of its own world: their ids,
and the ranks of those who hold them, will be the same. Nobody knows who will be in that world, so all do it, also those
that hold none of these devices. It happens in a thread of low priority, once the run is under way. Read next:
`programs.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxscale import axes
from jaxscale.config import Config, MeshConfig
from jaxscale.data import source
from jaxscale.data.position import phase_at_step, phases
from jaxscale.mesh import make_mesh
from jaxscale.optim.build import make_optimizer
from jaxscale.recipe import Hooks
from jaxscale.supervisor.programs import StoredPrograms, program_identity
from jaxscale.train.evaluate import make_evaluate
from jaxscale.train.hooks import with_step_metrics
from jaxscale.train.state import abstract_state
from jaxscale.train.step import make_step
from jaxscale.train.tables import weights_of

WAIT_SECONDS = 5.0
"""How long after the start: the running world's own programs come first."""
NICENESS = 10

logger = logging.getLogger(__name__)


class CompileAhead:
    """A thread that compiles for `smaller`, the world after the next loss."""

    def __init__(self, config: Config, hooks: Hooks, folder: Path, smaller: Mapping[str, Any]) -> None:
        """`smaller`: `mesh` (axis sizes), `devices` (to emulate, 0 = real) and `processes` of that world."""
        self._config = dataclasses.replace(config, mesh=MeshConfig(**smaller["mesh"]), devices=smaller["devices"])
        self._hooks, self._folder = hooks, folder
        self._processes = int(smaller["processes"])
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compile-ahead", daemon=True)

    def start(self, step: int, after_seconds: float = WAIT_SECONDS) -> None:
        """`step`: updates done, which tells the phase whose batches count."""
        self._step, self._after = step, after_seconds
        self._thread.start()

    def close(self) -> None:
        """Nothing is begun any more; a compilation under way is left to end with the process."""
        self._ending.set()

    def _run(self) -> None:
        if self._ending.wait(self._after):
            return
        with contextlib.suppress(OSError):  # Linux alone has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._compile()
        except Exception:  # costs the shrink its compilation, no more
            logger.exception("the programs of the next smaller world could not be compiled ahead")

    def _compile(self) -> None:
        config = self._config
        devices = [device for device in jax.devices() if device.process_index < self._processes]
        mesh = make_mesh(config, devices)
        with jax.set_mesh(mesh):
            programs = StoredPrograms(self._folder, program_identity(config, self._processes, devices), devices)
            for name, lower in self._wanted(config, mesh):
                if not self._ending.is_set() and programs.prepare(name, lower):
                    logger.info("compiled ahead for a world of %d processes: %s", self._processes, name)

    def _wanted(self, config: Config, mesh: jax.sharding.Mesh) -> list[tuple[str, Callable[[], jax.stages.Lowered]]]:
        """Names of programs, as the loop asks for them, and how they are lowered."""
        task = with_step_metrics(config.model.task(config), self._hooks)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = abstract_state(config, task, optimizer)
        number = jax.ShapeDtypeStruct((), "int32")
        step: Any = make_step(config, task, optimizer)
        phase = phase_at_step(phases(config), self._step)
        trained = abstract_batch(config, mesh, phase.batch, phase.sequence)
        wanted = [(program_name("train step", trained), lambda: step.lower(state, trained, number))]
        if config.data.held_out_documents:
            evaluate: Any = make_evaluate(task)
            judged = abstract_batch(config, mesh, config.data.batch, config.data.sequence)
            params = weights_of(state)
            wanted.append((program_name("evaluate", judged), lambda: evaluate.lower(params, judged)))
        return wanted


def program_name(what: str, batch: Mapping[str, Any]) -> str:
    """Name of the program of `what` for batches of this shape."""
    return f"{what} {'x'.join(map(str, batch['loss_weight'].shape))}"


def abstract_batch(config: Config, mesh: jax.sharding.Mesh, batch: int, sequence: int) -> dict[str, Any]:
    """Shapes and shardings (`jax.ShapeDtypeStruct`) of `batch` rows on a mesh, as the loader makes them."""
    rows = axes.padded_batch(batch, config.train.microbatches, axes.batch_shards(mesh.shape))
    return source.abstract_batch(config.model.layout(sequence), rows, mesh)
