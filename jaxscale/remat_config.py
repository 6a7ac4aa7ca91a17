"""What is recomputed or moved away between forward and backward: a part of the config, cheap to import.

Read next: `remat.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxscale.config_error import require


@dataclass(frozen=True)
class RematConfig:
    """What the backward pass recomputes: see `remat.py`."""

    policy: Literal["none", "full", "dots", "names", "offload"] = "full"
    """none keeps all activations, full none, dots the matrix products; names and offload those that `names` lists."""
    names: tuple[str, ...] = ("attention", "mlp")
    """Activations kept (names) or moved to host memory (offload)."""
    offload: tuple[str, ...] = ()
    """Activations moved to host memory beside those that policy names or full keeps."""

    def __post_init__(self) -> None:
        require(
            not self.offload or self.policy in ("full", "names"),
            f"remat.offload goes with remat.policy full or names, not {self.policy}; set one of them",
        )
        both = sorted(set(self.offload) & set(self.names)) if self.policy == "names" else []
        require(not both, f"remat.names and remat.offload both have {', '.join(both)}; take it out of one")
