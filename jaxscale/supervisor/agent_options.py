"""What an agent is told when it is started. Read next: `agent.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jaxscale.supervisor.job_token import Token
from jaxscale.supervisor.maintenance import Maintenance
from jaxscale.supervisor.rpc import Tls


@dataclass(frozen=True)
class AgentOptions:
    """Who this agent is and where it finds the others."""

    job: str
    host: str
    slice: int
    devices: int
    """Devices to emulate on this host; 0 = the real ones."""
    coordinator: str
    token: Token
    shared_memory: Path
    """Folder of the job's hosts; this one makes its own below it."""
    listen: str = "127.0.0.1"
    """Address of this host, at which the others reach its slot server and its epochs' services."""
    takeover_after: float = 2.0
    """Seconds without any coordinator after which this host starts one; 0: never."""
    maintenance: Maintenance = field(default_factory=Maintenance)
    tls: Tls | None = None
