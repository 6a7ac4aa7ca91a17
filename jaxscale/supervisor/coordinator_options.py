"""What a coordinator is started with. Read next: `coordinator.py`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxscale.supervisor.job_token import Token
from jaxscale.supervisor.rpc import Tls
from jaxscale.supervisor.worlds import Request


@dataclass(frozen=True)
class CoordinatorOptions:
    """What a coordinator is started with."""

    job: str
    token: Token
    listen: str
    """host:port; port 0 lets the kernel choose."""
    recipe: str
    """Absolute path; every host has it there."""
    arguments: tuple[str, ...]
    """Overrides, as on the command line."""
    command: tuple[str, ...] = ()
    """How an agent starts another coordinator of this run, without where it listens."""
    invite: tuple[str, ...] = ()
    """Addresses of agents that may not know of this coordinator."""
    elected_within: float = float("inf")
    """Seconds after which it gives up if no majority has promised."""
    tls: Tls | None = None
    request: Request | None = None
    """The world that is asked for; agents that have no place in it are refused."""

    hosts: int = 0
    """How many are to come, spares too."""

    @property
    def owner(self) -> str:
        """What the run's owner is known by: the job, told from another cluster's of the same name."""
        return f"{self.job} {self.token.digest}"
