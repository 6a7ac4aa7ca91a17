"""Loads a whole state as a start would, to see that it can be: on the devices that are here, with any mesh.

Digests say that the bytes are those that were written; this says that this version of jaxscale makes a state of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import tree
from jaxscale.checkpoint.layout import read_record, step_folder
from jaxscale.checkpoint.restore import restore
from jaxscale.checkpoint.stored_layout import restoring
from jaxscale.config import MeshConfig
from jaxscale.config_file import config_from_dict
from jaxscale.mesh import make_mesh, prepare_backend
from jaxscale.optim.build import make_optimizer
from jaxscale.train.state import abstract_state


@dataclass(frozen=True)
class Trial:
    """How it went."""

    arrays: int
    nbytes: int
    """Of the state."""
    seconds: float
    not_finite: tuple[str, ...]
    """Weights with a NaN or an infinity."""


def try_to_load(run: Path, step: int, devices: int = 0) -> Trial:
    """`devices`: emulate so many CPU devices; 0 = those that there are.

    Raises DamagedCheckpoint, StateMismatch, and ConfigError for a config that this version cannot use.
    """
    path = step_folder(run / "checkpoints", step)
    config = config_from_dict(read_record(path).config, f"{path / 'config.json'}")
    config = replace(config, on="", devices=devices, mesh=MeshConfig())
    prepare_backend(config)
    with jax.set_mesh(make_mesh(config)):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        began = time.monotonic()

        def read(abstract: Mapping[str, Any]) -> Any:
            return restore(run / "checkpoints", step, abstract)

        found = restoring(task.stored_layout, read)(abstract_state(config, task, optimizer))
        assert found is not None, "restore raises where it finds nothing"
        leaves = tree.flatten(found[0])
        jax.block_until_ready(list(leaves.values()))
        seconds = time.monotonic() - began
        weights = {name: leaf for name, leaf in leaves.items() if name.startswith("params/")}
        bad = tuple(name for name, leaf in weights.items() if not bool(jnp.isfinite(leaf).all()))
    return Trial(len(leaves), sum(leaf.nbytes for leaf in leaves.values()), seconds, bad)
