"""The two ways in which the workers of an epoch end together at one step: `drain` and `handover`.

A drain saves into the durable tier, because the run is to stop; a handover saves into memory, because the next epoch
begins at once with other members. All processes must know which of the two it is, so each has an agreement of its own.
Read next: `supervised_run.py`.
"""

from __future__ import annotations

import signal

from jaxscale.supervisor.zygote import tell_preempted
from jaxscale.world import Agreement

DRAIN, HANDOVER = "drain", "handover"


class StopSignals:
    """SIGINT asks for a drain, SIGUSR2 for a handover; SIGTERM is the cloud's word, which the agent passes on."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        signal.signal(signal.SIGINT, lambda *_: self.asked.add(DRAIN))
        signal.signal(signal.SIGUSR2, lambda *_: self.asked.add(HANDOVER))
        signal.signal(signal.SIGTERM, tell_preempted)


class WorldStop:
    """`StopRequest` of a supervised world."""

    def __init__(self, signals: StopSignals, drain: Agreement, handover: Agreement) -> None:
        self._signals = signals
        self._agreements = {DRAIN: drain, HANDOVER: handover}
        self.agreed = ""
        """Which of the two it is, once all processes know."""

    def requested(self) -> str:
        """The reason to stop; the same answer to the same call on every process."""
        for name, agreement in self._agreements.items():
            if not self.agreed and agreement.any_asks(name in self._signals.asked):
                self.agreed = name
        return self.agreed
