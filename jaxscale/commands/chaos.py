"""`jaxscale chaos RECIPE --seed S --faults N`: does a supervised run survive what it is made to survive?

Read next: `../chaos/run.py`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxscale.commands.parse import UsageError, parse
from jaxscale.recipe import load_recipe

EXAMPLES = """\
  20 faults of every kind, chosen by seed 3:
    jaxscale chaos recipes/lm_nano.py --seed 3 --faults 20
  only killed and hung workers, the result as JSON:
    jaxscale chaos recipes/lm_nano.py --faults 10 --kinds kill hang --json
  more seeds, compared with one undisturbed run:
    jaxscale chaos recipes/lm_nano.py --seed 4 --steps 900 --reference runs/undisturbed
The run keeps its size where spares stand in for lost hosts (--spares); then losses must agree bit for bit."""


@dataclass(frozen=True)
class ChaosCommand:
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = tyro.MISSING
    """Recipe file."""
    seed: int = 0
    """Which faults, when, and to whom."""
    faults: int = 5
    """How many."""
    kinds: tuple[str, ...] = ()
    """Kinds of faults; none given: all. They are listed below."""
    steps: int = 0
    """Steps of the run; 0 = enough for all faults."""
    slices: int = 2
    """Slices of the emulated cluster."""
    hosts_per_slice: int = 2
    """Hosts of each."""
    spares: int = 1
    """Hosts that stand in for a lost one."""
    every: int = 1
    """Steps between memory checkpoints."""
    durable: int = 50
    """Steps between durable checkpoints, for what no memory has any more; 0 = none before the end."""
    least: int = 5
    """Fewest new steps between two faults."""
    most: int = 25
    """Most."""
    tolerance: float = 1e-5
    """Relative difference of losses that is allowed for 50 steps after the first resize; then it doubles every 50."""
    folder: str = ""
    """Where the runs go; empty: a temporary folder that is removed."""
    reference: str = ""
    """Folder with the undisturbed run, to use it again for other seeds with the same --steps; it is made where it does
    not exist yet. Empty: each call trains its own."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the report as JSON."""


def run_chaos_command(args: Sequence[str], prog: str | None = None) -> int:
    """Runs it and returns 0 if everything held, 1 if not."""
    from jaxscale.chaos.faults import KINDS

    kinds = "\n".join(f"  {name:<12} {kind.about}" for name, kind in KINDS.items())
    command = parse(
        ChaosCommand,
        args,
        prog=prog or "jaxscale chaos",
        description="Strikes a supervised run with real faults and compares it with an undisturbed one.",
        examples=f"{EXAMPLES}\n\nKinds of faults:\n{kinds}",
        default=ChaosCommand(),
    )
    if unknown := [kind for kind in command.kinds if kind not in KINDS]:
        raise UsageError(f"there is no kind of fault {unknown[0]!r}; kinds are {', '.join(KINDS)}")
    for name, least in (("faults", 1), ("least", 1), ("slices", 1), ("hosts_per_slice", 1), ("durable", 0)):
        if getattr(command, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(command, name)}; use {least} or more")
    if command.slices == 1 and "slice" in command.kinds:
        raise UsageError("the kind slice takes all hosts of a slice away, and with --slices 1 there is no other")
    if command.most < command.least:
        raise UsageError(f"--most {command.most} is less than --least {command.least}")
    recipe = load_recipe(command.recipe).path
    if command.folder:
        return _run(command, recipe, Path(command.folder).absolute())
    with tempfile.TemporaryDirectory(prefix="jaxscale-chaos-") as name:
        return _run(command, recipe, Path(name))


def _run(command: ChaosCommand, recipe: Path, folder: Path) -> int:
    from jaxscale.chaos.faults import KINDS
    from jaxscale.chaos.run import run_chaos, undisturbed
    from jaxscale.chaos.schedule import schedule, steps_for

    def tell(text: str) -> None:
        if not command.json:
            print(text, flush=True)

    kinds = command.kinds or tuple(kind for kind in KINDS if kind != "slice" or command.slices > 1)
    strikes = schedule(command.seed, command.faults, kinds, command.least, command.most)
    steps = command.steps or steps_for(strikes)
    shape = ("--slices", command.slices, "--hosts-per-slice", command.hosts_per_slice)
    common = (*shape, "--steps", steps, "--memory.every", command.every, "--checkpoint.every", command.durable)
    home = Path(command.reference).absolute() if command.reference else folder / "undisturbed"
    if not command.reference:
        shutil.rmtree(home, ignore_errors=True)
    reference = undisturbed(recipe, home, common, tell)
    tell(f"seed {command.seed}: {command.faults} faults")
    run = folder / f"seed-{command.seed}"
    shutil.rmtree(run, ignore_errors=True)
    overrides = (*common, "--spares", command.spares)
    report = run_chaos(recipe, run, command.seed, strikes, reference, overrides, command.tolerance, tell)
    if command.json:
        print(json.dumps({**dataclasses.asdict(report), "passed": report.passed}))
    else:
        tell(_summary(report))
    return 0 if report.passed else 1


def _summary(report: Any) -> str:
    times = sorted(r.seconds for r in report.recoveries if r.seconds)
    lines = [f"{len(report.recoveries)} faults"]
    if times:
        lines[0] += f"; back after {statistics.median(times):.2f} s (median), {times[-1]:.2f} s (worst)"
    size = "resized on the way" if report.resized else "the world kept its size"
    lines.append(f"losses: {size}, largest relative difference to the undisturbed run {report.largest_difference:.1e}")
    if report.ledger is not None:
        wall, effective = f"{report.ledger.wall:.0f} s", f"{report.ledger.effective:.1%}"
        lines.append(f"time: {wall}, {effective} effective, {report.ledger.accounted:.2%} accounted for")
    return "\n".join([*lines, *(f"PROBLEM: {p}" for p in report.problems), "passed" if report.passed else "FAILED"])
