"""Real supervised runs on this machine: agents, zygotes, workers, and faults that are done to them."""

import os
import signal
import textwrap
from pathlib import Path

import pytest

from jaxscale.chaos.faults import KINDS
from jaxscale.cli import main
from jaxscale.testing.cluster import launched, left_behind

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"
pytestmark = pytest.mark.usefixtures("one_cache")


def test_a_run_under_chaos_trains_what_an_undisturbed_run_trains(tmp_path, capsys):
    """Five faults; losses bit for bit, each row once, the right class, nothing left behind."""
    kinds = ("kill", "coordinator", "flip", "host", "agent")
    code = main(
        [
            "chaos",
            str(NANO),
            "--seed",
            "1",
            "--faults",
            "5",
            "--folder",
            str(tmp_path),
            "--least",
            "3",
            "--most",
            "8",
            "--kinds",
            *kinds,
        ]
    )
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.splitlines()[-1] == "passed"
    assert "the world kept its size, largest relative difference to the undisturbed run 0.0e+00" in printed
    assert sum(line.startswith("  ") for line in printed.splitlines()) == 5


def test_a_flipped_bit_in_memory_is_found_and_never_loaded(tmp_path):
    with launched(
        NANO, tmp_path / "run", "--slices", 1, "--hosts-per-slice", 2, "--memory.every", 1, "--steps", 40
    ) as run:
        run.wait_for_step(10)
        host, pid = run.worker(1)
        os.kill(pid, signal.SIGSTOP)
        for slot in (run.memory(host) / "own").glob("gen-*"):
            with open(slot, "r+b") as file:  # in the middle of the largest array, which every worker needs
                file.seek(slot.stat().st_size // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 4]))
        os.kill(pid, signal.SIGKILL)
        run.wait_for_step(12, epoch=2)
        assert run.finish() == 0
        (restored,) = run.events("restored")
        rejected = run.events("rejected")
    assert rejected, "the damage was not even seen"
    assert all(event["tier"] == "memory" and "gen-" in event["path"] for event in rejected)
    assert restored["sources"].get("peer", 0) + restored["sources"].get("memory", 0) > 0


def test_a_bug_in_user_code_ends_the_run_at_its_second_time_with_the_traceback_last(tmp_path):
    recipe = tmp_path / "broken.py"
    recipe.write_text(
        textwrap.dedent(
            f"""
            import importlib.util
            import jax
            from jaxscale.recipe import Hooks

            spec = importlib.util.spec_from_file_location("nano", {str(NANO)!r})
            nano = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(nano)
            config = nano.config

            def boom(context):
                raise ZeroDivisionError(f"a bug after {{context.step}} updates")

            def hooks(config):
                return Hooks(evaluations={{"mine": boom}})
            """
        )
    )
    flags = ("--slices", 2, "--hosts-per-slice", 1, "--memory.every", 2, "--steps", 40, "--evaluate.every", 10)
    with launched(recipe, tmp_path / "run", *flags) as run:
        assert run.finish() == 1
        faults = run.events("fault")
        last = run.output.strip().splitlines()[-1]
    assert [fault["class"] for fault in faults] == ["recoverable", "fatal"]
    assert last == "ZeroDivisionError: a bug after 10 updates"
    assert not left_behind(tmp_path / "run")


def test_a_stop_saves_and_the_same_command_goes_on(tmp_path):
    flags = ("--slices", 2, "--hosts-per-slice", 1, "--memory.every", 5, "--steps", 60)
    with launched(NANO, tmp_path / "run", *flags) as run:
        run.wait_for_step(10)
        run.process.send_signal(signal.SIGTERM)
        assert run.finish() == 75
        stopped = run.last_line()["step"]
    assert 10 <= stopped < 60
    with launched(NANO, tmp_path / "run", *flags) as run:
        assert run.finish() == 0
        lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert {line["epoch"] for line in lines} == {1, 2}


@pytest.mark.slow
def test_a_preempted_host_is_left_out_at_a_step_border_and_nothing_is_lost(tmp_path):
    flags = ("--slices", 2, "--hosts-per-slice", 1, "--memory.every", 2, "--steps", 120, "--restart-after", -1)
    with launched(NANO, tmp_path / "run", *flags) as run:
        run.wait_for_step(20)
        os.kill(run.worker(1)[1], signal.SIGTERM)
        assert run.finish() == 0
        (resized,) = run.events("resized")
        trained = [(line["step"], line["epoch"]) for line in run.lines()]
    assert (resized["slices_before"], resized["slices_after"]) == (2, 1)
    assert [step for step, _ in trained] == list(range(1, 121))  # no step twice
    assert {epoch for _, epoch in trained} == {1, 2}


def test_every_kind_of_fault_says_what_it_is():
    assert all(kind.about for kind in KINDS.values())
