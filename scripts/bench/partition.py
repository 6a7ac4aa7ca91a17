"""How long training stands after a partition: one host of four is cut off, with the coordinator or without it.

    python scripts/bench/partition.py [--cuts 10] [--recipe recipes/lm_nano.py]

4 hosts in 2 slices in network namespaces of their own (needs root), a memory checkpoint every step. Time = from the cut
to the first line of metrics.jsonl of a later epoch with a new step. Then the network heals and the world grows back to
4 hosts before the next cut. The minority must write nothing: no line of an epoch that the majority did not form.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from jaxscale.testing.namespaces import unavailable
from jaxscale.testing.separated import SeparatedCluster, separated

HEAL_SECONDS = 120


def leader(cluster: SeparatedCluster) -> int:
    """Index of the host whose coordinator was elected last."""
    starts = {event["pid"]: event["address"] for event in cluster.events("coordinator_started")}
    pid = int(cluster.events("elected")[-1]["term"][1].split("-")[-2])
    address = starts[pid].rpartition(":")[0]
    return next(i for i in range(4) if cluster.net.address(i) == address)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/lm_nano.py"))
    options = parser.parse_args()
    if reason := unavailable():
        parser.error(reason)
    found: dict[bool, list[float]] = {True: [], False: []}
    flags = ("--memory.every", 1, "--checkpoint.every", 0, "--steps", 1_000_000)
    with (
        tempfile.TemporaryDirectory(prefix="jaxscale-partition-") as folder,
        separated(options.recipe, Path(folder) / "run", *flags) as cluster,
    ):
        cluster.wait_for_step(30, seconds=HEAL_SECONDS)
        for number in range(options.cuts):
            seat = leader(cluster)
            alone = seat if number % 2 == 0 else (seat + 1 + number // 2 % 3) % 4
            before, began = cluster.last_line(), time.time()
            cluster.net.cut([alone], [i for i in range(4) if i != alone])
            after = cluster.wait_for_step(before["step"] + 1, before["epoch"] + 1, seconds=HEAL_SECONDS)
            found[alone == seat].append(after["time"] - began)
            members = [event["host"] for event in cluster.events("worker_started", epoch=after["epoch"])]
            assert f"host-{alone}" not in members, f"host-{alone} was cut off and trains in epoch {after['epoch']}"
            who = f"host-{alone}{' with the coordinator' if alone == seat else ''}"
            print(f"  {who}: {found[alone == seat][-1]:.2f} s", flush=True)
            cluster.net.heal()
            cluster.wait_for(lambda: True if cluster.members() == 4 else None, "a world of 4", HEAL_SECONDS)
            cluster.wait_for_step(cluster.last_line()["step"] + 20, seconds=HEAL_SECONDS)
        late = cluster.late_writes()
    print(f"{'cut off':<32}{'cuts':>5}{'median s':>10}{'worst s':>9}   target")
    for with_coordinator, seconds in found.items():
        if seconds:
            what = "a host with the coordinator" if with_coordinator else "a host"
            print(f"{what:<32}{len(seconds):>5}{statistics.median(seconds):>10.2f}{max(seconds):>9.2f}   6")
    print(f"written by a minority after the majority had gone on: {len(late)} lines and steps (target 0)")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
