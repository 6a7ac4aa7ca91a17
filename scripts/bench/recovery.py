"""How long training stands after a fault: median and worst, beside the targets of a supervised run.

    python scripts/bench/recovery.py [--faults 10] [--kinds kill hang host] [--recipe recipes/lm_nano.py]

4 hosts in 2 slices and a spare, a memory checkpoint every step. Time = from the fault to the first line of
metrics.jsonl of a later epoch with a new step. Faults of one kind come one after another in one run, 25 steps apart, so
that progress has paid back what a host did before.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from jaxscale.chaos.faults import KINDS
from jaxscale.chaos.run import RECOVERY_SECONDS, strike_once
from jaxscale.chaos.schedule import Strike
from jaxscale.testing.cluster import launched

TARGETS = {
    "kill": "1 / 2.5",
    "crash": "1 / 2.5",
    "two": "1 / 2.5",
    "service": "1 / 2.5",
    "hang": "3 / 5",
    "host": "4 / 6",
}
"""Seconds, median / worst, with steps under 0.1 s on quiet cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", default=["kill", "hang", "host"], choices=sorted(KINDS))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/lm_nano.py"))
    options = parser.parse_args()
    print(f"{'kind':<10}{'faults':>7}{'median s':>10}{'worst s':>9}{'replayed':>10}   target (median / worst)")
    with tempfile.TemporaryDirectory(prefix="jaxscale-recovery-") as folder:
        for kind in options.kinds:
            flags = ("--slices", 2, "--hosts-per-slice", 2, "--spares", 1, "--memory.every", 1, "--steps", 1_000_000)
            with launched(options.recipe, Path(folder) / kind, *flags) as cluster:
                cluster.wait_for_step(30, seconds=RECOVERY_SECONDS * 3)
                found = [strike_once(cluster, Strike(kind, 25, seed)) for seed in range(options.faults)]
            seconds = [recovery.seconds for recovery in found]
            replayed = max(recovery.replayed for recovery in found)
            row = f"{kind:<10}{len(found):>7}{statistics.median(seconds):>10.2f}{max(seconds):>9.2f}{replayed:>10}"
            print(f"{row}   {TARGETS.get(kind, '-')}", flush=True)


if __name__ == "__main__":
    main()
