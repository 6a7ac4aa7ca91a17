"""How gradients cross from slice to slice: a part of the config, cheap to import. Read next: `gradient_exchange.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxscale.config_error import require


@dataclass(frozen=True)
class AcrossConfig:
    """What is sent of the gradients over the mesh axis `data`, from slice to slice (docs/multislice.md compares)."""

    gradients: Literal["direct", "float32", "bfloat16", "int8", "top-k", "random-k", "power-sgd"] = "direct"
    """`direct` sums each weight's gradient over all slices as soon as it is there, in precision.reduce; all others once
    a step, after the last microbatch. What top-k, random-k and power-sgd leave out is added to the next gradient."""
    share: float = 0.01
    """top-k and random-k: share of the numbers of each weight (of each layer) that is sent."""
    rank: int = 4
    """power-sgd: rank of what is sent of each weight."""
    warmup: int = 0
    """top-k, random-k and power-sgd: steps at the start of the run whose gradients are sent whole."""
    block: int = 256
    """int8: numbers of a weight that share a scale."""

    def __post_init__(self) -> None:
        require(
            0 < self.share <= 1,
            f"across.share is {self.share}; it is the share of a gradient's numbers that is sent, above 0 and at most "
            "1: use 0.01 to send one in a hundred",
        )
        require(self.rank >= 1, f"across.rank is {self.rank}; a matrix of rank 0 is zero: use 1 or more, often 4")
        require(self.warmup >= 0, f"across.warmup is {self.warmup}; use 0 or more steps")
        require(
            8 <= self.block <= 65536,
            f"across.block is {self.block}; use 8 (scales are half of what is sent) to 65536, often 256",
        )

    @property
    def keeps_residual(self) -> bool:
        """Whether each slice keeps what it has not sent yet."""
        return self.gradients in ("top-k", "random-k", "power-sgd")

    def check(self, slices: int, noise_scale: bool, chunks: int, *, fresh: bool) -> None:
        """Raises ConfigError for what does not go together. `fresh`: a run that starts; one that goes on with the only
        slice that is left is not refused. noise_scale, chunks: of train and of pipeline.
        """
        if self.gradients == "direct":
            return
        require(
            slices > 1 or not fresh,
            f"across.gradients is {self.gradients}, and mesh.data is 1: one slice has nobody to send "
            "gradients to; set mesh.data to the number of slices, or across.gradients to direct",
        )
        require(
            not noise_scale,
            f"train.noise-scale compares gradients of microbatches over all slices, which across.gradients "
            f"{self.gradients} never adds up; set across.gradients to direct, or train.noise-scale to False",
        )
        require(
            not (self.keeps_residual and chunks > 1),
            f"across.gradients is {self.gradients}, whose residuals have no place yet among the {chunks} chunks "
            "of a pipeline stage; set pipeline.chunks to 1, or across.gradients to int8",
        )
