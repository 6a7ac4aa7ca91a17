"""What a fault costs and whether anything was lost by it, row by row beside the targets of a supervised run.

    python scripts/bench/recovery.py [--rows kill hang host slice ...] [--faults 20] [--recipe recipes/lm_nano.py]
    python scripts/bench/recovery.py --rows kill --apart 15 --every 10      effective training time at a fault per 15 s

4 hosts in 2 slices and a spare, a memory checkpoint every step (`--every`). Time = from the fault to the first line of
metrics.jsonl of a later epoch with a new step. Faults of one row come one after another, at most 20 in a run, 25 steps
apart, so that progress has paid back what a host did before. Losses of a row are compared with an undisturbed run: bit
for bit while the world keeps its size. Rows:

    a kind of `jaxscale chaos` (kill, hang, host, coordinator, preempt, flip, ...)
    slice    both hosts of a slice are lost, without a spare; later they are back. Two rows: shrink, and grow, where the
             time is that between the last step of the smaller world and the first one of the larger
    bug      an evaluation of the recipe raises, always at the same step: from the first failure to the end of the run

Exit code 1 where anything was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from jaxscale.chaos.faults import KINDS
from jaxscale.chaos.run import RECOVERY_SECONDS, run_chaos, undisturbed
from jaxscale.chaos.schedule import Strike, steps_for
from jaxscale.testing.cluster import RunningCluster, launched

TARGETS = {
    "kill": "1 / 2.5",
    "crash": "1 / 2.5",
    "two": "1 / 2.5",
    "service": "1 / 2.5",
    "hang": "3 / 5",
    "host": "4 / 6",
    "shrink": "4 / 6",
    "grow": "4 / 6",
    "flip": "100 % detected",
    "coordinator": "0 steps lost, 0 workers restarted",
    "preempt": "0 steps lost",
    "bug": "10",
}
"""Seconds, median / worst, with steps under 0.1 s on quiet cores; for longer ones two steps more."""
EFFECTIVE = ((100, 0.97), (15, 0.85))
"""Seconds between faults from which on this share of the time must be effective."""
SHAPE = ("--slices", 2, "--hosts-per-slice", 2)
IN_ONE_RUN = 20
"""Faults; a host is started again at most so often."""
AHEAD_SECONDS = 60.0
"""After the start, before the first slice is lost: by then the smaller world's program is compiled ahead."""
ABSENT_SECONDS = 8.0
"""How long a lost slice stays away."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20, help="of each row")
    parser.add_argument("--rows", nargs="+", default=["kill", "hang", "host"], choices=[*sorted(KINDS), "slice", "bug"])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/lm_nano.py"))
    parser.add_argument("--every", type=int, default=1, help="steps between memory checkpoints")
    parser.add_argument("--apart", type=float, default=0, help="seconds between faults, instead of 25 steps")
    options = parser.parse_args()
    print(f"{'row':<12}{'faults':>7}{'median s':>10}{'worst s':>9}{'replayed':>10}   target (median / worst)")
    with tempfile.TemporaryDirectory(prefix="jaxscale-recovery-") as name:
        bench = Bench(options, Path(name))
        for row in options.rows:
            {"slice": bench.lose_slices, "bug": bench.fail_always}.get(row, lambda row=row: bench.strike(row))()
    for problem in bench.problems:
        print(f"PROBLEM: {problem}")
    return 1 if bench.problems else 0


class Bench:
    """The rows, and what went wrong in any of them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._flags = (*SHAPE, "--memory.every", options.every)
        self.problems: list[str] = []
        self._paces: list[float] = []
        """Of undisturbed steps, seconds."""

    def strike(self, kind: str) -> None:
        """Faults of one kind, and the losses compared."""
        recoveries, effective, rejected, workers = [], [], 0, 0
        for first in range(0, self._options.faults, IN_ONE_RUN):
            seeds = range(first, min(first + IN_ONE_RUN, self._options.faults))
            strikes = [Strike(kind, self._apart(), seed) for seed in seeds]
            flags = (*self._flags, "--steps", steps_for(strikes))
            reference = undisturbed(self._options.recipe, self._folder / f"undisturbed-{flags[-1]}", flags, ignore)
            run = self._folder / f"{kind}-{first}"
            flags = (*flags, "--spares", 1)
            report = run_chaos(self._options.recipe, run, first, strikes, reference, flags, 1e-5, ignore)
            self.problems += [f"{kind}: {problem}" for problem in report.problems]
            recoveries += report.recoveries
            self._paces += [line["step_seconds"] for line in reference[50:]]
            effective += [report.ledger.effective] if report.ledger else []
            events = [json.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()]
            rejected += len({event["time"] for event in events if event["kind"] == "rejected"})
            workers += sum(event["kind"] == "worker_started" for event in events)
        seconds = [recovery.seconds for recovery in recoveries] or [float("nan")]
        wanted = next((share for apart, share in EFFECTIVE if self._options.apart >= apart), None)
        more = f"; {min(effective):.1%} effective" if self._options.apart and effective else ""
        if more and wanted is not None:
            more += f" (target {wanted:.0%})"
        if kind == "flip":
            more = f"; {rejected} damaged shards were read, and rejected"
        if kind == "coordinator":
            more = f"; {workers} workers were started, all of them at the beginning"
            self.problems += [] if workers == 4 * -(-len(recoveries) // IN_ONE_RUN) else [f"{kind}: {workers} workers"]
        replayed = max((recovery.replayed for recovery in recoveries), default=0)
        self._print(kind, seconds, replayed, more)

    def _apart(self) -> int:
        """New steps between two faults."""
        if not self._options.apart:
            return 25
        flags = (*self._flags, "--steps", 300)
        lines = undisturbed(self._options.recipe, self._folder / "pace", flags, ignore)
        pace = (lines[-1]["time"] - lines[99]["time"]) / (lines[-1]["step"] - lines[99]["step"])
        return max(1, round(self._options.apart / pace))

    def lose_slices(self) -> None:
        """Slices leave and come back."""
        shrunk, grown, replayed = [], [], 0
        run = self._folder / "slice"
        flags = (*self._flags, "--restart-after", ABSENT_SECONDS, "--steps", 1_000_000)
        with launched(self._options.recipe, run, *flags) as cluster:
            cluster.wait_for_step(30, seconds=RECOVERY_SECONDS * 3)
            time.sleep(AHEAD_SECONDS)
            for number in range(self._options.faults):
                lost = [f"host-{2 * (number % 2) + i}" for i in range(2)]
                before = cluster.last_line()
                for host in lost:
                    cluster.kill_host(host)
                started = time.time()
                small = _next(cluster, before)
                shrunk.append(small["time"] - started)
                again = [x for x in cluster.lines() if x["epoch"] > before["epoch"] and x["step"] <= before["step"]]
                replayed = max(replayed, len(again))
                if cluster.members() != 2:
                    self.problems.append(f"slice: {cluster.members()} workers train after a slice was lost")
                cluster.wait_for(lambda: cluster.members() == 4 or None, "a world of 4", RECOVERY_SECONDS)
                whole = cluster.wait_for_step(0, small["epoch"] + 1, RECOVERY_SECONDS)
                last = [line for line in cluster.lines() if line["epoch"] < whole["epoch"]][-1]
                first = next(line for line in cluster.lines() if line["epoch"] == whole["epoch"])
                grown.append(first["time"] - last["time"])
                if first["step"] != last["step"] + 1:
                    self.problems.append(f"slice: after step {last['step']} the larger world trained {first['step']}")
                cluster.wait_for_step(first["step"] + 25, seconds=RECOVERY_SECONDS)
        self._print("shrink", shrunk, replayed)
        self._print("grow", grown, 0)

    def fail_always(self) -> None:
        """A bug of the recipe ends the run at its second time."""
        seconds = []
        for number in range(self._options.faults):
            recipe, run = self._folder / "bug.py", self._folder / f"bug-{number}"
            recipe.write_text(textwrap.dedent(BUG).format(recipe=str(self._options.recipe.absolute())))
            flags = (*self._flags, "--steps", 1000, "--evaluate.every", 20 + number)
            with launched(recipe, run, *flags) as cluster:
                code = cluster.finish(RECOVERY_SECONDS * 3)
                ended = time.time()
                faults, words = cluster.events("fault"), cluster.output.strip().splitlines()[-1]
            seconds.append(ended - faults[0]["time"])
            if (code, [f["class"] for f in faults]) != (
                1,
                ["recoverable", "fatal"],
            ) or "ZeroDivisionError" not in words:
                self.problems.append(f"bug: exit code {code} after {len(faults)} faults; the last line is {words!r}")
        self._print("bug", seconds, 0)

    def _print(self, row: str, seconds: list[float], replayed: int, more: str = "") -> None:
        figures = f"{len(seconds):>7}{statistics.median(seconds):>10.2f}{max(seconds):>9.2f}{replayed:>10}"
        pace = f"; steps of {statistics.median(self._paces):.3f} s" if self._paces else ""
        print(f"{row:<12}{figures}   {TARGETS.get(row, '-')}{pace}{more}", flush=True)


BUG = """
    import importlib.util
    from jaxscale.recipe import Hooks

    spec = importlib.util.spec_from_file_location("recipe", {recipe!r})
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.config

    def wrong(context):
        raise ZeroDivisionError(f"a bug after {{context.step}} updates")

    def hooks(config):
        return Hooks(evaluations={{"wrong": wrong}})
"""


def _next(cluster: RunningCluster, before: dict[str, Any]) -> dict[str, Any]:
    """The first line of a later epoch with a new step."""

    def further() -> dict[str, Any] | None:
        later = (line for line in cluster.lines() if line["epoch"] > before["epoch"] and line["step"] > before["step"])
        return next(later, None)

    return cluster.wait_for(further, "a new step of a later epoch", RECOVERY_SECONDS)


def ignore(_: str) -> None:
    """What chaos tells line by line is in its files."""


if __name__ == "__main__":
    sys.exit(main())
