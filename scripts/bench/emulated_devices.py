"""Do emulated devices stand? Trains `lm_tiny` on 8 of them while another thread gives them work, and counts the steps.

    python scripts/bench/emulated_devices.py [--steps 60] [--runs 3] [--schedule concurrent|plain]

`concurrent` is how XLA schedules CPU programs by itself: after some ten steps all devices but the last wait in a
collective that the last one never enters, no thread runs anything for it, and XLA ends the process. `plain` is what
jaxscale asks for where it emulates devices (`mesh.EMULATION_FLAG`). The other thread and a pool of 32 threads (`NPROC`)
only make it happen sooner: a run without them stood on a busy machine. Exit code 1 when a run stood.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxscale.mesh import EMULATION_FLAG

RECIPE = Path(__file__).resolve().parent.parent.parent / "recipes/lm_tiny.py"
SOONER = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=6 --xla_cpu_collective_call_terminate_timeout_seconds=12"
PROGRAM = """
import os, runpy, sys, threading, time

def disturb():
    import jax, jax.numpy as jnp
    while not os.path.exists(metrics):  # JAX has its devices before there is a first line
        time.sleep(0.1)
    squares = [jax.device_put(jnp.ones((256, 256)), device) for device in jax.devices()]
    work = jax.jit(lambda x: jnp.tanh(x @ x).sum())
    while not done.wait(1):
        squares.append(squares.pop(0))
        work(squares[0])

done = threading.Event()
metrics = sys.argv[-1] + "/metrics.jsonl"
thread = threading.Thread(target=disturb, daemon=True)
thread.start()
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    done.set()  # a thread that is still inside XLA when Python ends would take the process down
    thread.join()
"""


def train(steps: int, schedule: str) -> tuple[int, int, float]:
    """(exit code, steps done, seconds)."""
    flags = f"{SOONER} {EMULATION_FLAG}={'true' if schedule == 'concurrent' else 'false'}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "32"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(RECIPE), "--devices", "8", "--steps", str(steps), "--run.dir", f"{folder}/run"]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], env=environment, capture_output=True, text=True
        )
        seconds = time.monotonic() - start
        if done.returncode and "Termination timeout" not in done.stderr:
            raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    return done.returncode, json.loads(lines[-1])["step"] if lines else 0, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--schedule", choices=("concurrent", "plain"), default="plain")
    options = parser.parse_args()
    stood = 0
    for number in range(options.runs):
        code, steps, seconds = train(options.steps, options.schedule)
        stood += code != 0
        print(f"run {number + 1}: {'stood after' if code else 'did'} {steps} steps, {seconds:.0f} s", flush=True)
    print(f"{stood} of {options.runs} runs stood ({options.schedule} schedule)")
    return 1 if stood else 0


if __name__ == "__main__":
    sys.exit(main())
