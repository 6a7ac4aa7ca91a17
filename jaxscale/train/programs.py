"""Where the loop gets its compiled programs from: a plain run compiles, a supervised one keeps what was compiled.

JAX's compilation cache is not enough for a recovery in seconds: the program must be traced and lowered before it can be
looked up, and in a world of CPUs only process 0 finds it. Read next: `loop.py`; `supervisor/programs.py` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

Compiled = Callable[..., Any]


class Programs(Protocol):
    """Gives the program of a name; names are unique within a run and a world."""

    def get(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Compiled:
        """The compiled program. `lower` traces and lowers it, where it has to be compiled."""
        ...


class CompileHere:
    """Compiles each program when it is asked for (JAX's cache on disk then saves most of the work)."""

    def get(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Compiled:  # noqa: ARG002 - the protocol
        return lower().compile()
