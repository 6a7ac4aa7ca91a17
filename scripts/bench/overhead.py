"""What the supervisor costs while nothing happens: step time of a supervised world of 4 and of a plain one.

    python scripts/bench/overhead.py [--rounds 3] [--steps 300]

Both train the same recipe in 4 processes, alternately; the supervised one makes a memory checkpoint every 10 steps with
a copy at a peer, and sends heartbeats. Medians of the steps after the first 50; the ratio of the medians of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from jaxscale.testing.cluster import launched
from jaxscale.testing.processes import run_world
from jaxscale.track.jsonl import read_metrics

WARM = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/lm_nano.py"))
    options = parser.parse_args()
    plain: list[float] = []
    supervised: list[float] = []
    with tempfile.TemporaryDirectory(prefix="jaxscale-overhead-") as folder:
        for number in range(options.rounds):
            run = Path(folder) / f"plain-{number}"
            train = ["-m", "jaxscale", "train", str(options.recipe), "--distributed", "{distributed}", "--devices", "4"]
            flags = ["--mesh.data", "2", "--steps", str(options.steps), "--run.dir", str(run)]
            run_world([*train, *flags], 4, timeout=1200)
            plain += _seconds(run)
            run = Path(folder) / f"supervised-{number}"
            shape = ("--slices", 2, "--hosts-per-slice", 2, "--memory.every", 10, "--steps", options.steps)
            with launched(options.recipe, run, *shape) as cluster:
                assert cluster.finish(1200) == 0, cluster.output
                blocked = [event["blocked_seconds"] for event in cluster.events("sealed") if event["tier"] == "memory"]
            supervised += _seconds(run)
            print(f"round {number + 1}: plain {_ms(plain)} ms, supervised {_ms(supervised)} ms a step", flush=True)
    ratio = statistics.median(supervised) / statistics.median(plain)
    share = statistics.median(blocked) / 10 / statistics.median(supervised) if blocked else float("nan")
    print(f"ratio {ratio:.3f} (target 1.01); blocked by a memory checkpoint {share:.2%} of step time (target < 1 %)")


def _seconds(run: Path) -> list[float]:
    return [line["step_seconds"] for line in read_metrics(run / "metrics.jsonl") if line["step"] > WARM]


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1000:.1f}"


if __name__ == "__main__":
    main()
