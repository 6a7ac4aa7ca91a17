"""The persister: a process of low priority on each host that writes the host's part of durable steps. No JAX.

Reads orders from its standard input, one JSON line each, and answers each with a line; ends when its input does. It is
scheduled behind everything else (SCHED_IDLE), and like everything else once an order has waited long: the memory slot
that it reads is kept for it meanwhile. Read next: `../checkpoint/persist.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jaxscale.checkpoint.persist import persist
from jaxscale.checkpoint.slot import SlotError
from jaxscale.supervisor.inventory import OWN

IDLE_SECONDS = 5.0
"""How long an order is worked on behind everything else."""


def main() -> int:
    """Obeys until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the whole group; the agent says when to end
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_obey(order)), flush=True)
    return 0


def _obey(order: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    _behind_everything(True)
    hurry = threading.Timer(IDLE_SECONDS, _behind_everything, (False,))
    hurry.daemon = True
    hurry.start()
    answer = {"epoch": order["epoch"], "step": order["step"]}
    try:
        slots = sorted((Path(order["folder"]) / OWN).glob("gen-*"))
        size = persist(slots, order["job"], order["epoch"], order["step"], Path(order["target"]))
        return {**answer, "bytes": size, "seconds": round(time.monotonic() - started, 4)}
    except (SlotError, OSError) as error:
        return {**answer, "reason": str(error)}
    finally:
        hurry.cancel()


def _behind_everything(yes: bool) -> None:
    """Sets how all threads are scheduled, and those that they start; where that is not allowed it stays as it is."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(int(thread), os.SCHED_IDLE if yes else os.SCHED_OTHER, os.sched_param(0))


if __name__ == "__main__":
    sys.exit(main())
