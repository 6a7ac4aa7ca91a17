"""What a run that was stopped says of itself: only what really lies on disk is called saved. Pure.

A stop saves where the workers can. Where they cannot (a host is lost, nobody waits), the hosts' memory goes with them,
and only the durable tier is left. Read next: `show.py`, which says it.
"""

from __future__ import annotations

from jaxscale.train.display import last_line
from jaxscale.train.protocols import ExitReason


def stopped_line(step: int, total: int, durable: int | None, run_dir: str, why: str = "") -> str:
    """`step`: the last one trained in this start, 0 = none; `durable`: the newest step on disk, None = none is."""
    if step and durable == step:
        return last_line(ExitReason.STOPPED, step, total, run_dir, why)
    asked = f" ({why})" if why else ""
    stopped = (
        f"stopped{asked} after step {step:,} of {total:,}" if step else f"stopped{asked} before a step was trained"
    )
    if durable is None:
        return f"{stopped}; nothing is saved: the same command again starts from step 0"
    if durable < step:
        lost = f"the {step - durable:,} steps" if step - durable > 1 else "the step"
        return (
            f"{stopped}; the newest durable checkpoint is of step {durable:,}, {lost} after it went with the hosts' "
            "memory: the same command again goes on from the checkpoint"
        )
    return f"{stopped}; step {durable:,} is saved: the same command again goes on from there"
