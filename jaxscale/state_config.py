"""Where the state of a run lies: a part of the config, cheap to import. Read next: `parallel/zero.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxscale.config_error import require


@dataclass(frozen=True)
class StateConfig:
    """Where weights and the optimizer's state lie. It changes no value of a run but by the order of sums (zero)."""

    zero: Literal[1, 2, 3] = 3
    """What the devices of mesh.fsdp share: 1 the optimizer's state, 2 gradients too, 3 weights too."""
    offload: tuple[Literal["opt", "ema", "params"], ...] = ()
    """Entries kept in pinned host memory: opt and ema come for the update, params layer by layer."""

    def __post_init__(self) -> None:
        require(
            "params" not in self.offload or self.zero == 3,
            f"state.offload params with state.zero {self.zero} would keep whole weights on the host once for each "
            "device; set state.zero to 3, or leave params out",
        )
        require(
            len(set(self.offload)) == len(self.offload),
            f"state.offload is {','.join(self.offload)}; name each entry once",
        )
