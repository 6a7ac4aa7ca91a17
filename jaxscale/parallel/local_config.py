"""Slices that train on their own for some steps: a part of the config, cheap to import. Read next: `local_sgd.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxscale.config_error import require


@dataclass(frozen=True)
class LocalConfig:
    """DiLoCo: each slice (mesh axis `data`) updates weights of its own; now and then all take a common step."""

    every: int = 0
    """Steps between two exchanges of a weight; 0 = off: slices share every gradient."""
    learning_rate: float = 0.7
    """Of the outer step, on the mean over slices of how far they have moved. 1 with momentum 0 = plain averaging."""
    momentum: float = 0.9
    """Of the outer step, after Nesterov."""
    fragments: int = 1
    """Parts of the model that are exchanged at different steps, evenly spread over `every`."""
    delay: int = 0
    """Steps that a slice trains on while an exchange is under way, before its result is put in."""
    mixing: float = 0.0
    """Share of a slice's own weights that stays when a result is put in; for a delay, 0.5 keeps half of what it did."""
    exchange: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """What is sent of each slice's movement."""
    block: int = 256
    """int8 and int4: numbers that share a scale."""

    def __post_init__(self) -> None:
        require(
            self.every >= 0,
            f"local.every is {self.every}; use 1 or more steps between exchanges, often 30 to 500, or 0 to turn local "
            "steps off",
        )
        require(
            0 < self.learning_rate <= 10, f"local.learning-rate is {self.learning_rate}; use 0.4 to 1, above 0 anyway"
        )
        require(0 <= self.momentum < 1, f"local.momentum is {self.momentum}; it lies in [0, 1)")
        require(
            0 <= self.mixing < 1,
            f"local.mixing is {self.mixing}; it is a share in [0, 1): 0 takes over the common weights",
        )
        require(self.fragments >= 1, f"local.fragments is {self.fragments}; use 1 (all at once) or more")
        require(
            not self.every or self.fragments <= self.every,
            f"local.fragments is {self.fragments}, and there are only {self.every} steps (local.every) to "
            f"exchange them in; use {self.every} or fewer",
        )
        require(self.delay >= 0, f"local.delay is {self.delay}; use 0 or more steps")
        require(
            not self.every or self.delay < self.every,
            f"local.delay is {self.delay}: the next exchange of the same weights, {self.every} steps (local.every) "
            f"later, would begin before the last one has ended; use at most {max(self.every - 1, 0)}",
        )
        require(
            8 <= self.block <= 65536,
            f"local.block is {self.block}; use 8 (scales are much of what is sent) to 65536, often 256",
        )

    def check(self, slices: int, weights: int, others: Mapping[str, tuple[Any, Any]], *, fresh: bool) -> None:
        """Raises ConfigError for what does not go together. `fresh`: a run that starts; one that goes on with the only
        slice that is left is not refused. others: settings by name, as they are and as they have to be.
        """
        if not self.every:
            return
        require(
            slices > 1 or not fresh,
            f"local.every is {self.every}, and mesh.data is 1: one slice has nobody to exchange weights with; set "
            "mesh.data to the number of slices, or local.every to 0",
        )
        require(
            self.fragments <= weights,
            f"local.fragments is {self.fragments}, and the model has {weights} weights, which are exchanged whole; use "
            f"{weights} or fewer",
        )
        for name, (value, needed) in others.items():
            require(
                value == needed,
                f"{name} is {value}, which slices that train on their own (local.every {self.every}) do not do; set "
                f"{name} to {needed}, or local.every to 0",
            )
