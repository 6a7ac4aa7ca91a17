"""How the processes of a world agree on a checkpoint before any of them acts. In a world of one, both are free.

Saving and restoring meet at barriers: a process that decides alone would wait there for ever. Read next: `durable.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxscale import world
from jaxscale.train.protocols import World


def everywhere(yes: bool) -> bool:
    """Whether `yes` holds on every process. All processes call it, in the same order."""
    return highest(not yes) == 0


def highest(number: int) -> int:
    """The highest of the numbers that the processes give. All processes call it, in the same order."""
    if jax.process_count() == 1:
        return int(number)
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.array(number, np.int32))))


def from_first(value: Any) -> Any:
    """A JSON value of process 0, on every process; what the others pass is ignored. Raises WorldError."""
    return world.broadcast_json(World(processes=jax.process_count(), index=jax.process_index()), value)
