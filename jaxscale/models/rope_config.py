"""How positions are turned into rotations. Cheap to import: recipes use it. Read next: `layers/rope.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxscale.config import ConfigError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embeddings: frequencies theta^(-2f/K), stretched by `factor` in the way that `scaling` names."""

    theta: float = 10000.0
    """Base of the frequencies: larger for longer rows."""
    scaling: Literal["none", "linear", "ntk", "llama3", "yarn"] = "none"
    """`linear`: positions divided by the factor (Chen et al. 2023); `ntk`: theta raised so that the lowest frequency is
    divided by it; `llama3`: only wavelengths beyond the original length (Llama 3.1); `yarn`: Peng et al. 2023."""
    factor: float = 1.0
    """How many times longer rows may become."""
    original_length: int = 8192
    """llama3, yarn: row length of the training before stretching."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_length / this are divided by the whole factor."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_length / this are left alone."""
    beta_slow: float = 1.0
    """yarn: frequencies that turn fewer times than this over the original length are divided by the whole factor."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this are left alone."""

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ConfigError(f"rope.theta is {self.theta}; it must be above 1, for example 10000")
        if self.factor < 1:
            raise ConfigError(f"rope.factor is {self.factor}; rows can only be stretched, by 1 or more")
        if self.scaling == "none" and self.factor != 1:
            raise ConfigError(
                f"rope.factor is {self.factor} but rope.scaling is none; set rope.scaling or leave factor at 1"
            )
        if self.original_length < 1:
            raise ConfigError(f"rope.original-length is {self.original_length}; it is a row length of 1 or more")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ConfigError(
                f"rope.low-frequency-factor ({self.low_frequency_factor}) must be positive and below "
                f"rope.high-frequency-factor ({self.high_frequency_factor})"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ConfigError(
                f"rope.beta-slow ({self.beta_slow}) must be positive and below rope.beta-fast ({self.beta_fast})"
            )
