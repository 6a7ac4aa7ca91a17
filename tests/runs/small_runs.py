"""A run so small that a test can afford several: flags of `lm_nano` made smaller, in this process or in one of its own.

The flags are those of a user, so a test in this process trains what the command trains.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxscale import trainer
from jaxscale.commands.train import read
from jaxscale.config import Config
from jaxscale.recipe import Hooks
from jaxscale.track.jsonl import read_metrics
from jaxscale.train.display import Display
from jaxscale.train.protocols import ExitReason, World

ROOT = Path(__file__).resolve().parents[2]
NANO = str(ROOT / "recipes" / "lm_nano.py")
STEPS = 12
SMALL = (
    *("--model.layers", "1", "--model.width", "32", "--model.heads", "2", "--model.mlp", "64"),
    *("--model.vocabulary", "264", "--data.sequence", "32", "--data.batch", "8", "--optim.warmup", "2"),
)
"""The model and its rows."""
EVERYTHING = (
    *("--steps", str(STEPS), "--model.dropout", "0.1", "--optim.ema", "0.9", "--train.microbatches", "2"),
    *("--train.noise-scale", "--run.layer-stats-every", "4", "--train.spike-window", "8"),
    *("--data.held-out-documents", "1", "--evaluate.every", "4", "--evaluate.batches", "2"),
)
"""What else a run can have that its state must remember."""
CLOCKS = ("time", "step_seconds", "pause_seconds", "epoch")
"""Fields of a metrics line that no rerun repeats."""


def config_of(*flags: object) -> Config:
    """The config of `python recipes/lm_nano.py SMALL flags`."""
    return read([NANO, *SMALL, *map(str, flags)])[1].config


def train(folder: Path, *flags: object, hooks: Hooks | None = None) -> ExitReason:
    """Trains in this process, on as many of its 8 emulated devices as the flags ask for."""
    return trainer.train(config_of("--run.dir", folder, *flags), World(), hooks)


def command(folder: Path, *flags: object, script: Sequence[str] = (NANO,)) -> list[str]:
    """The command line that trains in a process of its own. `script`: what stands in for the recipe."""
    return [sys.executable, *script, *SMALL, "--run.dir", str(folder), *map(str, flags)]


def run(arguments: Sequence[str], timeout: float = 240, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with the compilation cache of the tests."""
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout, check=False, env=environment(), **options
    )


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a reader of metrics.jsonl sees: by step, the highest epoch counts; without what no rerun repeats."""
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder / "metrics.jsonl")]


def losses(folder: Path) -> list[float]:
    """The losses of steps 1, 2, 3, ...; fails where a step is missing."""
    found = lines(folder)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1)), "a hole in metrics.jsonl"
    return [line["loss"] for line in found]


def wait_for_lines(process: subprocess.Popen[Any], folder: Path, count: int) -> None:
    """Returns when metrics.jsonl has so many lines; fails where the process ends before."""
    while process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    pytest.fail(f"the process ended with {process.returncode} before it had written {count} lines")


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """The last line of stderr, where an error is; `(nothing)` where there is none."""
    return (result.stderr.strip().splitlines() or ["(nothing)"])[-1]


@contextlib.contextmanager
def at_section(section: str, step: int, action: Callable[[], object]) -> Iterator[None]:
    """Does something once, when the loop enters a section with `step` updates done."""
    pending = [action]

    def enter(_: Display, entered: str, at: int) -> None:
        if (entered, at) == (section, step) and pending:
            pending.pop()()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "enter", enter)
        yield
    assert not pending, f"the loop never entered {section!r} with {step} updates done"


def signal_self(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def stop_after(folder: Path, step: int, *flags: object, hooks: Hooks | None = None) -> None:
    """Trains until `step` updates are done, and then stops with a checkpoint of exactly that step."""
    with at_section("step", step - 1, signal_self()):
        assert train(folder, *flags, hooks=hooks) is ExitReason.STOPPED
    assert len(losses(folder)) == step
