"""Real runs that are hurt in every section: a worker that hangs there, and a host that is told to end there."""

import os
import signal
import textwrap
import time
from pathlib import Path

import pytest

from jaxscale.testing.cluster import launched, left_behind
from jaxscale.testing.separated import separated

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
COMMON = ("--slices", 2, "--hosts-per-slice", 1, "--memory.every", 2)
EVALUATIONS = ("--data.held-out-documents", 1, "--evaluate.every", 1, "--evaluate.batches", 1)
SAVES = ("--checkpoint.every", 1)

pytestmark = pytest.mark.usefixtures("one_cache")

RECIPE = """
import ctypes
import importlib.util
import time
from pathlib import Path

import jax

from jaxscale.supervisor.records import ProgressRecord

spec = importlib.util.spec_from_file_location("nano", {nano!r})
nano = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nano)
config, marker, enter = nano.config, Path({marker!r}), ProgressRecord.enter


def stay_there():
    {action}


def entering(self, section, step):
    enter(self, section, step)
    if section == {section!r} and step >= {step} and jax.process_index() == 1 and not marker.exists():
        marker.touch()
        stay_there()


ProgressRecord.enter = entering
"""
SLEEP, HOLD_THE_LOCK, LOOP = "time.sleep(3600)", "ctypes.PyDLL(None).sleep(3600)", "while True: pass"


def recipe_that(folder, action, section, step):
    """lm_nano, whose process 1 does something when it enters a section after so many steps, once in all epochs."""
    path, marker = folder / "recipe.py", folder / "there"
    text = textwrap.dedent(RECIPE)
    path.write_text(text.format(nano=str(NANO), marker=str(marker), action=action, section=section, step=step))
    return path, marker


@pytest.mark.parametrize(
    ("section", "action", "flags"),
    [
        ("data", SLEEP, ()),
        pytest.param("step", HOLD_THE_LOCK, (), marks=pytest.mark.slow),
        pytest.param("evaluate", HOLD_THE_LOCK, EVALUATIONS, marks=pytest.mark.slow),
        pytest.param("save", LOOP, SAVES, marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_hangs_is_found_where_it_hangs_and_its_stacks_are_kept(tmp_path, section, action, flags):
    recipe, _ = recipe_that(tmp_path, action, section, 15)
    with launched(recipe, tmp_path / "run", *COMMON, *flags, "--steps", 30) as run:
        assert run.finish(240) == 0
        faults, stacks = run.events("fault"), run.events("stacks")
        assert [line["step"] for line in run.metrics()] == list(range(1, 31))
    (fault,) = faults
    # Where the others wait for the one that hangs, nobody can tell them apart, and all are suspected.
    hung = {one["host"]: one["section"] for one in fault["evidence"] if one["kind"] == "worker_hung"}
    assert hung["host-1"] == section
    assert fault["class"] == ("transient" if section == "data" else "recoverable"), "a loader gets another chance"
    (found,) = [one for one in stacks if one["host"] == "host-1"]
    assert "stay_there" in found["text"]
    assert found["time"] <= fault["time"], "the stacks are taken before anything is decided"
    assert not left_behind(tmp_path / "run")


WHO = {
    "agent": lambda run, host: run.agent(host),
    "zygote": lambda run, host: run.zygote(host),
    "worker": lambda run, host: next(e["pid"] for e in run.events("worker_started") if e["host"] == host),
}


@pytest.mark.parametrize(
    ("section", "step", "flags"),
    [
        pytest.param("compile", 0, (), marks=pytest.mark.slow),
        pytest.param("data", 10, (), marks=pytest.mark.slow),
        ("step", 10, ()),
        pytest.param("evaluate", 10, EVALUATIONS, marks=pytest.mark.slow),
        pytest.param("save", 10, SAVES, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "who", [pytest.param("agent", marks=pytest.mark.slow), pytest.param("zygote", marks=pytest.mark.slow), "worker"]
)
def test_a_host_that_is_told_to_end_leaves_within_the_notice_and_no_step_is_lost(tmp_path, who, section, step, flags):
    # Long enough to be told while it is there, and shorter than the least limit of a section, which is 1 s.
    recipe, marker = recipe_that(tmp_path, "time.sleep(0.5)", section, step)
    with launched(recipe, tmp_path / "run", *COMMON, *flags, "--steps", 30, "--restart-after", -1) as run:
        run.wait_for(lambda: marker.exists() or None, f"process 1 in the section {section}", 120)
        worker = WHO["worker"](run, "host-1")
        os.kill(WHO[who](run, "host-1"), signal.SIGTERM)
        told = time.monotonic()
        run.wait_for(lambda: not Path(f"/proc/{worker}").exists() or None, "end of the worker", 60)
        took = time.monotonic() - told
        assert run.finish(240) == 0
        assert run.events("fault") == []
        trained = [line["step"] for line in run.lines()]
        hosts = [(e["epoch"], e["host"]) for e in run.events("worker_started")]
    assert took < 25, "clouds give 30 s"
    assert trained == list(range(1, 31)), "each step once"
    assert hosts == [(1, "host-0"), (1, "host-1"), (2, "host-0")]
    assert not left_behind(tmp_path / "run")


def assert_handed_over(run, worker, leaves, stays):
    """The host's worker ends within the notice, the other host goes on, and each step is trained once."""
    told = time.monotonic()
    run.wait_for(lambda: not Path(f"/proc/{worker}").exists() or None, "end of the worker", 60)
    took = time.monotonic() - told
    assert run.finish(240) == 0
    assert run.events("fault") == []
    trained = [line["step"] for line in run.lines()]
    hosts = {(e["epoch"], e["host"]) for e in run.events("worker_started")}
    assert took < 25, "clouds give 30 s"
    assert trained == list(range(1, len(trained) + 1)), "each step once"
    assert hosts == {(1, leaves), (1, stays), (2, stays)}
    assert [e["detail"] for e in run.events("alarm") if e["what"] == "preemption"] == [f"{leaves} was told to end"]


def test_a_file_says_that_a_host_is_to_end_and_no_step_is_lost(tmp_path):
    notice = tmp_path / "notice"
    flags = {"host-1": ("--maintenance-file", notice)}
    options = ("--memory.every", 2, "--steps", 60)
    with separated(
        NANO, tmp_path / "run", *options, shape=(2, 1), by_proxy=True, flags=lambda host: flags.get(host, ())
    ) as run:
        run.wait_for_step(10)
        (worker,) = [e["pid"] for e in run.events("worker_started") if e["host"] == "host-1"]
        notice.touch()
        assert_handed_over(run, worker, "host-1", "host-0")
        assert len(run.metrics()) == 60
    assert not left_behind(tmp_path / "run")


def test_a_host_whose_epoch_host_is_told_to_end_leaves_and_no_step_is_lost(tmp_path):
    """JAX's coordination service, without which no worker lives, is not ended before they have handed over."""
    with launched(NANO, tmp_path / "run", *COMMON, "--steps", 60, "--restart-after", -1) as run:
        run.wait_for_step(10)
        host, service = run.service()
        (worker,) = [e["pid"] for e in run.events("worker_started") if e["host"] == host]
        os.kill(service, signal.SIGTERM)
        assert_handed_over(run, worker, "host-0", "host-1")
        assert len(run.metrics()) == 60
    assert not left_behind(tmp_path / "run")
