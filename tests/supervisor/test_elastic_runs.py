"""Real runs that lose hosts for good: fewer go on, from memory alone, with the same batches and without compiling."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxscale.testing.cluster import launched, left_behind
from jaxscale.track.jsonl import read_metrics

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
STEPS = 40
THREE = ("--model.width", 96, "--model.heads", 3, "--model.mlp", 192, "--train.microbatches", 2)
"""A model that three devices can hold one third of each: lm_nano's own sizes are powers of two. A microbatch has four
rows, which do not come out even either."""
COMMON = (*THREE, "--steps", STEPS, "--checkpoint.every", 0, "--memory.every", 2)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cache")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_cache):  # noqa: ARG001 - for its effect
    """Lines of the same training in one process over as many devices."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    flags = (*THREE, "--run.dir", run, "--devices", 4, "--steps", STEPS, "--checkpoint.every", 0)
    command = [sys.executable, "-m", "jaxscale", "train", str(NANO), *map(str, flags)]
    subprocess.run(command, check=True, timeout=300, stdin=subprocess.DEVNULL, capture_output=True)
    return read_metrics(run / "metrics.jsonl")


def check_history(run, undisturbed):
    """Each step is committed once, with the rows and the loss that it has without a fault."""
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for field in ("row", "rows", "tokens"):
        assert [line[field] for line in lines] == [line[field] for line in undisturbed]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in undisturbed], rel=1e-5)
    return lines


def sealed_at(run, step):
    """Waits for a step and gives the newest memory checkpoint that is known by then."""
    run.wait_for_step(step)
    run.wait_for_event("sealed", tier="memory")
    return run.events("sealed")[-1]["step"]


def restored_from_memory(run, sealed):
    """The step of the one restore: of memory, no older than what was sealed, and of no step that was never trained."""
    (restored,) = run.events("restored")
    reached = max(line["step"] for line in run.lines() if line["epoch"] == 1)
    assert set(restored["sources"]) <= {"memory", "peer"}
    assert sum(restored["sources"].values()) > 0
    assert 0 < sealed <= restored["step"] <= reached
    assert not (run.run / "checkpoints" / str(restored["step"])).exists()
    return restored["step"]


def test_a_slice_that_loses_a_host_for_good_goes_on_with_three_and_trains_the_same(tmp_path, undisturbed):
    flags = (*COMMON, "--slices", 1, "--hosts-per-slice", 4, "--restart-after", -1)
    with launched(NANO, tmp_path / "run", *flags) as run:
        sealed = sealed_at(run, 12)
        run.kill_host("host-2")
        assert run.finish(400) == 0
        (resized,) = run.events("resized")
        lines = check_history(run, undisturbed)
        step = restored_from_memory(run, sealed)
        members = {e["host"] for e in run.events("worker_started", epoch=2)}
    assert resized["reason"] == "4 hosts before, 3 now"
    assert members == {"host-0", "host-1", "host-3"}  # eight rows over three hosts do not come out even
    assert [line["epoch"] for line in lines] == [1] * step + [2] * (STEPS - step)
    assert not left_behind(tmp_path / "run")


def test_three_hosts_go_on_also_where_no_tensor_can_be_cut_in_three(tmp_path):
    """Then the three hold whole copies of the weights (`data` 3) instead of thirds (`fsdp` 3)."""
    flags = ("--steps", 20, "--checkpoint.every", 0, "--memory.every", 2, "--slices", 1, "--hosts-per-slice", 4)
    with launched(NANO, tmp_path / "run", *flags, "--restart-after", -1) as run:
        run.wait_for_step(4)
        run.kill_host("host-2")
        assert run.finish(400) == 0
        assert [line["step"] for line in run.metrics()] == list(range(1, 21))


@pytest.mark.parametrize("lost", [("host-1", "host-2"), ("host-0", "host-1")], ids="+".join)
def test_two_hosts_that_die_at_once_with_their_memory_cost_nothing_where_two_others_hold_copies(
    tmp_path, undisturbed, lost
):
    """Rank 0 among them, with the host that holds its first copy."""
    flags = (*COMMON, "--slices", 1, "--hosts-per-slice", 4, "--restart-after", -1, "--memory.replicas", 2)
    with launched(NANO, tmp_path / "run", *flags) as run:
        sealed = sealed_at(run, 12)
        for host in lost:
            run.kill_host(host)
        assert run.finish(400) == 0
        check_history(run, undisturbed)
        restored_from_memory(run, sealed)
        left = {f"host-{number}" for number in range(4)} - set(lost)
        assert {e["host"] for e in run.events("worker_started")[-2:]} == left
    assert not left_behind(tmp_path / "run")


LISTENING = """
import importlib.util
import os
import threading
from pathlib import Path

import jax

spec = importlib.util.spec_from_file_location("nano", {nano!r})
nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nano)
config = nano.config


def compiled(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        with open(Path({folder!r}) / str(os.getpid()), "a") as file:
            print(threading.current_thread().name, about["fun_name"], file=file)


jax.monitoring.register_event_duration_secs_listener(compiled)
"""


class Compilations:
    """A recipe whose workers write down each program that JAX compiles, or looks up in its own cache."""

    def __init__(self, folder):
        self.recipe, self._told = folder / "listening.py", folder / "compiled"
        self._told.mkdir()
        self.recipe.write_text(textwrap.dedent(LISTENING).format(nano=str(NANO), folder=str(self._told)))

    def of(self, run):
        """Of each worker of the newest epoch, without what it compiles ahead for another world."""
        pids = [run.worker(rank)[1] for rank in range(run.members())]
        return [[name for thread, _, name in self._lines(pid) if thread != "compile-ahead"] for pid in pids]

    def _lines(self, pid):
        path = self._told / str(pid)
        return [line.partition(" ") for line in path.read_text().splitlines()] if path.exists() else []


def test_neither_a_recovery_nor_a_resize_compiles_anything_on_any_host(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAXSCALE_CACHE", str(cache))
    compilations = Compilations(tmp_path)

    def ahead():
        stored = [path for path in (cache / "programs").glob("*") if not path.suffix]
        return True if len(stored) == 4 else None  # step and evaluation of this world and of the next smaller one

    shape = ("--slices", 1, "--hosts-per-slice", 2, "--restart-after", 8)
    evaluations = ("--data.held-out-documents", 1, "--evaluate.every", 2, "--evaluate.batches", 1)
    flags = (*shape, *evaluations, "--memory.every", 2, "--checkpoint.every", 0, "--steps", 100_000)
    with launched(compilations.recipe, tmp_path / "run", *flags) as run:
        run.wait_for_step(5)
        first = [name for names in compilations.of(run) for name in names]
        assert any("train_step" in name for name in first), "the listener hears nothing"
        assert any("evaluate" in name for name in first), "the listener does not hear evaluations"
        run.wait_for(ahead, "programs of the smaller world", 200)
        os.kill(run.worker(1)[1], signal.SIGKILL)
        run.wait_for_step(1, epoch=2)
        run.wait_for_step(run.last_line()["step"] + 4)
        recovered = compilations.of(run)
        run.kill_host("host-1")
        run.wait_for_step(1, epoch=3)
        assert run.members() == 1
        run.wait_for_step(run.last_line()["step"] + 4)
        shrunk = compilations.of(run)
        run.wait_for_step(1, epoch=4, seconds=120)
        assert run.members() == 2
        run.wait_for_step(run.last_line()["step"] + 4)
        grown = compilations.of(run)
        run.process.send_signal(signal.SIGTERM)
        assert run.finish() == 75
    assert recovered == [[], []]
    assert shrunk == [[]]
    assert grown == [[], []]
