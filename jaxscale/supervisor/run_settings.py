"""What the machine needs to know of a run, from its config and its run directory. Read next: `machine.py`."""

from __future__ import annotations

import time
from pathlib import Path

from jaxscale.checkpoint import layout
from jaxscale.config import Config
from jaxscale.supervisor.facts import Settings


def settings_of(config: Config, checkpoints: Path) -> Settings:
    """`checkpoints`: folder of the durable steps. The newest one says how old it is by this machine's clock."""
    memory, durable = config.memory, config.checkpoint
    newest = layout.newest_step(checkpoints)
    made = None if newest is None else layout.made_at(checkpoints, newest)
    return Settings(
        config.steps,
        memory.every,
        memory.generations,
        memory.replicas,
        durable_every=durable.every,
        durable_apart=durable.apart,
        durable=-1 if newest is None else newest,
        durable_age=0.0 if made is None else max(0.0, time.time() - made),
        checkpoints=str(checkpoints),
    )
