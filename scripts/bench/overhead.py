"""What the supervisor costs while nothing happens: step time of a supervised world of 4 and of a plain one.

    python scripts/bench/overhead.py [--rounds 3] [--steps 300] [--state-mb 12 50 200]

Both train the same recipe in 4 processes, alternately; the supervised one makes a memory checkpoint every 10 steps with
a copy at a peer, and sends heartbeats. Medians of the steps after the first 50; the ratio of the medians of all rounds.
`--state-mb`: the recipe with a vocabulary that makes its state (weights and two moments, 12 bytes a parameter) about so
large. Processor time of the agents, which send, receive and verify, is counted between step 50 and the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import psutil

from jaxscale.testing.cluster import RunningCluster, launched
from jaxscale.testing.processes import run_world
from jaxscale.track.jsonl import read_metrics

WARM, EVERY = 50, 10
WIDTH, OTHERS = 128, 300_000
"""Of lm_nano: width of the table and the head, and about how many parameters are elsewhere."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/lm_nano.py"))
    parser.add_argument("--state-mb", type=float, nargs="+", default=[0.0], help="0: the recipe as it is")
    options = parser.parse_args()
    columns = ("state MB", "plain ms", "supervised", "ratio", "blocked", "copy+digest ms/MB", "agents CPU-ms/MB")
    print("".join(f"{column:>19}" for column in columns) + "   (targets: ratio 1.01, blocked < 1 %)")
    for size in options.state_mb:
        _measure(options, size)


def _measure(options: argparse.Namespace, size: float) -> None:
    vocabulary = round((size * 1e6 / 12 - OTHERS) / (2 * WIDTH)) if size else 0
    common = ["--steps", str(options.steps), *(["--model.vocabulary", str(max(512, vocabulary))] if size else [])]
    plain: list[float] = []
    supervised: list[float] = []
    sealed: list[dict[str, Any]] = []
    agents: list[float] = []
    with tempfile.TemporaryDirectory(prefix="jaxscale-overhead-") as folder:
        for number in range(options.rounds):
            run = Path(folder) / f"plain-{number}"
            train = ["-m", "jaxscale", "train", str(options.recipe), "--distributed", "{distributed}", "--devices", "4"]
            run_world([*train, "--mesh.data", "2", "--run.dir", str(run), *common], 4, timeout=1200)
            plain += _seconds(run)
            run = Path(folder) / f"supervised-{number}"
            shape = ("--slices", 2, "--hosts-per-slice", 2, "--memory.every", EVERY, *common)
            with launched(options.recipe, run, *shape) as cluster:
                agents.append(_agents(cluster, options.steps))
                assert cluster.finish(1200) == 0, cluster.output
                sealed = [event for event in cluster.events("sealed") if event["tier"] == "memory"]
            supervised += _seconds(run)
    step = statistics.median(supervised)
    nbytes = statistics.median(event["bytes"] for event in sealed) / 1e6
    blocked = statistics.median(event["blocked_seconds"] for event in sealed)
    seconds = statistics.median(event["seconds"] for event in sealed)
    saved = nbytes * (options.steps - WARM) / EVERY
    figures = (
        f"{nbytes:.1f}",
        f"{statistics.median(plain) * 1000:.1f}",
        f"{step * 1000:.1f}",
        f"{step / statistics.median(plain):.3f}",
        f"{blocked / EVERY / step:.2%}",
        f"{seconds * 1000 / nbytes:.2f}",
        f"{statistics.median(agents) * 1000 / saved:.2f}",
    )
    print("".join(f"{figure:>19}" for figure in figures), flush=True)


def _agents(cluster: RunningCluster, steps: int) -> float:
    """Processor time of all agents from step WARM to shortly before the end, in seconds."""

    def used() -> float:
        found = (psutil.Process(cluster.agent(f"host-{number}")).cpu_times() for number in range(4))
        return sum(times.user + times.system for times in found)

    cluster.wait_for_step(WARM, seconds=600)
    before = used()
    cluster.wait_for_step(steps - 5, seconds=1200)
    return used() - before


def _seconds(run: Path) -> list[float]:
    return [line["step_seconds"] for line in read_metrics(run / "metrics.jsonl") if line["step"] > WARM]


if __name__ == "__main__":
    main()
