"""The recipe of `scripts/quickstart`, to its end: loss on the two works that are held out, and how long it takes.

    python scripts/bench/quickstart.py [--run RUN]

Trains `recipes/lm_shakespeare.py` on 8 emulated devices, or reads the finished run in RUN (without its wall clock).
Printed: figure, what it is compared with, ratio. The reference of the loss is a byte-level model of 4.2 M parameters,
which reached 1.76 nats per byte after 1.28 M training bytes; the wall clock is that of the whole process, on a quiet
machine with 2 cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "recipes" / "lm_shakespeare.py"
REFERENCE_LOSS, LOSS_TO_REACH, SECONDS_TO_REACH = 1.76, 1.75, 360.0


def train(folder: Path) -> float:
    """Seconds from the start of the process to its end."""
    command = [sys.executable, "-m", "jaxscale", "train", str(RECIPE), "--devices", "8", "--run.dir", str(folder)]
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def report(folder: Path, wall: float | None) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epoch = max(line["epoch"] for line in lines)
    last = max((line for line in lines if line["epoch"] == epoch), key=lambda line: line["step"])
    tokens, steps = sum(line["tokens"] for line in lines), sum(line["step_seconds"] for line in lines)
    print(f"{RECIPE.stem}: {last['step']} steps, {tokens / 1e6:.2f} M training bytes, {steps:.0f} s in steps")
    print(f"{'what':<38}{'measured':>10}{'reference':>11}{'ratio':>8}   to reach")
    loss = last["eval_loss"]
    _row("held-out loss, nats per byte", f"{loss:.3f}", f"{REFERENCE_LOSS:.2f}", loss / REFERENCE_LOSS, "< 1.75")
    if wall is not None:
        limit = f"{SECONDS_TO_REACH:.0f}"
        _row("process start to end, s", f"{wall:.0f}", limit, wall / SECONDS_TO_REACH, f"< {limit}")
    missed = [
        name for name, hit in (("loss", loss < LOSS_TO_REACH), ("time", (wall or 0) < SECONDS_TO_REACH)) if not hit
    ]
    print(f"NOT reached: {', '.join(missed)}" if missed else "reached")


def _row(what: str, measured: str, reference: str, ratio: float, limit: str) -> None:
    print(f"{what:<38}{measured:>10}{reference:>11}{ratio:>8.3f}   {limit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run to read, for example runs/quickstart")
    options = parser.parse_args()
    if options.run is not None:
        report(options.run, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        report(run, train(run))


if __name__ == "__main__":
    main()
