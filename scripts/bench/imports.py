"""What imports cost: `jaxscale` beside `jax`, and the libraries that jaxscale does without.

    python scripts/bench/imports.py [--rounds 9]

Each import is a fresh process, the modules take turns, medians are printed: of the whole process, and of what it
takes beyond `import jax` (which jaxscale leaves to the moment it trains). Seconds are those of the processor, which
other programs on the machine disturb less than the clock. To reach: jaxscale adds at most 0.3 s. flax is no dependency:
`pip install flax` where its line shows nan.
"""

import argparse
import resource
import statistics
import subprocess
import sys

WHAT = {
    "nothing": "pass",
    "jax": "import jax",
    "jaxscale": "import jaxscale",
    "jax and jaxscale": "import jax, jaxscale",
    "what training imports": "import jax, jaxscale.trainer",
    "jax and optax": "import jax, optax",
    "jax and flax.nnx": "import jax; from flax import nnx",
    "jax and orbax v1": "import jax; from orbax.checkpoint import v1",
}
LIMIT_SECONDS = 0.3


def seconds(code: str) -> float:
    """Processor time of a process that runs `code`; NaN where a module is not installed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return used if done.returncode == 0 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in WHAT}
    for number in range(options.rounds + 1):
        for name, code in WHAT.items():
            times[name] += [seconds(code)] * (number > 0)  # the first round fills the page cache
    print(f"medians of {options.rounds} alternating rounds{'seconds':>15}{'beyond jax':>13}")
    # Rounds are taken together: what else the machine does in one falls on all of its imports.
    beyond = {n: statistics.median(a - b for a, b in zip(v, times["jax"], strict=True)) for n, v in times.items()}
    for name, values in times.items():
        print(f"{name:<36}{statistics.median(values):>10.3f}{beyond[name]:>+13.3f}")
    added = beyond["jax and jaxscale"]
    verdict = "reached" if added <= LIMIT_SECONDS else "NOT reached"
    jax = statistics.median(times["jax"])
    ratio = 1 + added / jax
    print(f"jaxscale adds {added:+.3f} s to {jax:.3f} s: ratio {ratio:.2f}   to reach +{LIMIT_SECONDS} s   {verdict}")


if __name__ == "__main__":
    main()
