"""Where the state of a run lies: a part of the config, cheap to import. Read next: `parallel/zero.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StateConfig:
    """What the devices of `mesh.fsdp` share. The values of a run do not depend on it."""

    zero: Literal[1, 2, 3] = 3
    """1: they share the optimizer's state, 2: gradients too, 3: weights too."""
