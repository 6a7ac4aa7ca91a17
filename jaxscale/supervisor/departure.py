"""When a host that was told to end leaves by itself, because no coordinator is there to take it out of the world.

Where there is one it decides, and nothing here says a word: the workers hand over, or the run stops. Without one an
agent would serve for ever. A worker gets time in which another coordinator may come and end it well. Read next:
`agent.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxscale.supervisor.link import SILENT_SECONDS

ALONE_SECONDS = 3.0
"""So long a host without a worker waits for a coordinator: one that is started again is there by then."""
NOTICE_SECONDS = 30.0
"""So long a host with a worker waits: another coordinator may lead by then, and have the workers save together."""


@dataclass
class Departure:
    """What this host was told, and since when."""

    told: float | None = None
    """When it was told to end first; None: it was not."""
    insists: bool = False
    """It was told by a signal again while no coordinator was there."""

    @property
    def is_leaving(self) -> bool:
        """Whether the host was told to end."""
        return self.told is not None

    def notice(self, now: float) -> None:
        """The host is to end; said again, it changes nothing."""
        self.told = now if self.told is None else self.told

    def signal(self, now: float, is_alone: bool, has_worker: bool) -> str:
        """SIGTERM to the agent itself. The second one, where no coordinator is there, is an order.

        Returns what whoever sent it should know; empty where a coordinator is there.
        """
        self.insists = self.insists or (self.is_leaving and is_alone)
        self.notice(now)
        if not is_alone or self.insists:
            return ""
        seconds = NOTICE_SECONDS if has_worker else ALONE_SECONDS
        return f"told to end; a coordinator has {seconds:g} s to come, a second SIGTERM ends this host at once"

    def reason(self, now: float, silence: float, has_worker: bool) -> str:
        """Why the host leaves now, in words; empty while it stays."""
        if self.told is not None and self.insists:
            return f"told to end twice, and no coordinator for {silence:.0f} s"
        if self.told is None or silence <= SILENT_SECONDS:
            return ""
        alone = min(silence, now - self.told)
        if alone <= (NOTICE_SECONDS if has_worker else ALONE_SECONDS):
            return ""
        what = "its worker is ended" if has_worker else "no worker runs here"
        return f"told to end, no coordinator for {silence:.0f} s, and {what}"
