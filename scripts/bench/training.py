"""Speed, start and memory of training `lm_tiny`, beside the hand-written floor (`floor.py`).

    python scripts/bench/training.py [--rounds 5] [--steps 25]

Each round runs the two sides one after the other, each in a process of its own on 8 emulated devices; medians over
rounds are compared, so that what else the machine does falls on both alike. A round has a cold start (an empty
compilation cache), a warm start, and the steps of the warm run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(command: list[str], cache: Path) -> tuple[float, str]:
    """(wall-clock time at the start, output)."""
    environment = {**os.environ, "JAXSCALE_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    start = time.time()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}\n{errors}")
    return start, output


def floor(steps: int, cache: Path) -> dict[str, object]:
    command = [sys.executable, str(ROOT / "scripts/bench/floor.py"), "--steps", str(steps), "--cache", str(cache)]
    start, output = run(command, cache)
    result = json.loads(output.strip().splitlines()[-1])
    return {**result, "first_step_seconds": result["first_step_at"] - start}


def framework(steps: int, cache: Path) -> dict[str, object]:
    """The same figures of `recipes/lm_tiny.py`, from its metrics.jsonl; peak memory as the process itself saw it."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import resource, runpy, sys\n"
            f"sys.argv = ['lm_tiny.py', '--devices', '8', '--steps', '{steps}', '--run.dir', {folder + '/run'!r}]\n"
            "try:\n"
            f"    runpy.run_path({str(ROOT / 'recipes/lm_tiny.py')!r}, run_name='__main__')\n"
            "except SystemExit as ended:\n"
            "    assert not ended.code, ended.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
        )
        start, output = run([sys.executable, "-c", code], cache)
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    return {
        "first_step_seconds": lines[0]["time"] - start,
        "step_seconds": [line["step_seconds"] for line in lines],
        "peak_bytes": int(output.strip().splitlines()[-1]),
    }


def imported(module: str) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    sides = {"floor": floor, "jaxscale": framework}
    cold, warm, steps, peak = ({name: [] for name in sides} for _ in range(4))
    imports: dict[str, list[float]] = {"jax": [], "jaxscale": [], "jax, jaxscale": []}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, side in sides.items():
                cache = Path(folder) / name
                # As many steps as the warm run: the schedule is in the program, so another number is another program.
                cold[name].append(side(options.steps, cache)["first_step_seconds"])
            for name, side in sides.items():
                result = side(options.steps, Path(folder) / name)
                warm[name].append(result["first_step_seconds"])
                # The first steps pay for allocation; the median of the others is the round's steady step.
                steps[name].append(statistics.median(result["step_seconds"][3:]))
                peak[name].append(result["peak_bytes"])
        for module, seconds in imports.items():
            seconds.append(imported(module))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = [
        ("steady step, s", steps, 1.03),
        ("start to end of first step, cold cache, s", cold, 1.25),
        ("start to end of first step, warm cache, s", warm, 1.7),
        ("peak memory of the process, MB", {n: [b / 1e6 for b in v] for n, v in peak.items()}, 1.10),
    ]
    print(f"{'what':<45}{'jaxscale':>10}{'floor':>10}{'ratio':>8}{'to reach':>10}")
    for what, values, limit in rows:
        ours, reference = (statistics.median(values[name]) for name in ("jaxscale", "floor"))
        # Rounds are pairs: the median of their ratios is steadier than the ratio of the medians.
        ratio = statistics.median(a / b for a, b in zip(values["jaxscale"], values["floor"], strict=True))
        print(f"{what:<45}{ours:>10.3f}{reference:>10.3f}{ratio:>8.3f}{'<= ' + str(limit):>10}")
    jax, alone, both = (statistics.median(imports[name]) for name in imports)
    print(
        f"import jax {jax:.3f} s, import jaxscale {alone:.3f} s; jaxscale adds {both - jax:+.3f} s (to reach: <= 0.3)"
    )


if __name__ == "__main__":
    main()
