"""How a layer's MLP becomes a mixture of experts. Cheap to import: recipes use it. Read next: `layers/moe.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxscale.config import ConfigError


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts of every layer, which of them a token goes to, and what keeps their loads alike."""

    count: int = 0
    """Experts of a layer; 0 = a dense model, and nothing else here counts."""
    top_k: int = 2
    """Experts that a token goes to."""
    hidden: int = 0
    """Hidden units of an expert; 0 = model.mlp."""
    shared: int = 0
    """Experts that every token goes to beside those, without a gate: one MLP of shared x hidden units."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What a token's scores are: shares of one (Shazeer et al. 2017), or each for itself (DeepSeek-V3)."""
    normalise: bool = True
    """The gates of a token's experts add up to 1."""
    scale: float = 1.0
    """Factor of the gates behind that."""
    balance_loss: float = 0.0
    """Weight of the auxiliary loss that evens out loads (Fedus et al. 2021, equation 4); 0 = off."""
    bias_step: float = 0.0
    """Step of a bias per expert that counts for the choice alone and follows the load (DeepSeek-V3, section 2.1.2);
    0 = no bias."""
    z_loss: float = 0.0
    """Weight of the square of the scores' logsumexp (Zoph et al. 2022, equation 5); 0 = off."""
    capacity: float | None = None
    """Of each row an expert takes at most this times an even share, the first ones; what is over passes it by. None =
    everything is taken."""
    dispatch: Literal["auto", "dense", "ragged"] = "auto"
    """How tokens travel: in blocks with room for the worst case, or exactly as many as there are; auto = ragged on TPU
    where nothing is dropped, else dense."""

    def __post_init__(self) -> None:
        for name in ("count", "shared", "hidden", "balance_loss", "bias_step", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"model.experts.{name.replace('_', '-')} is {getattr(self, name)}; use 0 (off) or more"
                )
        if self.top_k < 1:
            raise ConfigError(f"model.experts.top-k is {self.top_k}; a token goes to 1 expert or more")
        if self.count and self.top_k > self.count:
            raise ConfigError(
                f"model.experts.top-k ({self.top_k}) is more than there are experts (model.experts.count "
                f"{self.count}); use {self.count} or less"
            )
        if self.count and self.top_k == 1 and self.normalise:
            raise ConfigError(
                "model.experts.top-k is 1 and the gates are normalised: each would be 1, and the router would learn "
                "nothing from the loss; set --model.experts.no-normalise or use 2 experts or more"
            )
        if self.scale <= 0:
            raise ConfigError(f"model.experts.scale is {self.scale}; it multiplies the gates, use 1 or another above 0")
        if self.capacity is not None and self.capacity <= 0:
            raise ConfigError(
                f"model.experts.capacity is {self.capacity}: no expert would take a token; use 1 to 2, or none given "
                "to drop nothing"
            )
        if self.capacity is not None and self.dispatch == "ragged":
            raise ConfigError(
                "model.experts.dispatch is ragged, which has no capacity to fill; use dense, or give no "
                f"model.experts.capacity ({self.capacity})"
            )
