"""SIGTERM and SIGINT, wherever they arrive: the run saves, says so, and the same command goes on bit for bit."""

import json
import os
import signal
import subprocess
import time

import pytest
from small_runs import (
    EVERYTHING,
    NANO,
    STEPS,
    at_section,
    command,
    environment,
    lines,
    losses,
    signal_self,
    train,
    wait_for_lines,
)

from jaxscale.checkpoint.restore import list_steps
from jaxscale.generate.words import Words
from jaxscale.recipe import Hooks
from jaxscale.train.protocols import ExitReason

FLAGS = (*EVERYTHING, "--devices", 2, "--checkpoint.every", 5)


@pytest.mark.parametrize(
    ("section", "step", "number", "saved"),
    [
        ("compile", 0, signal.SIGTERM, 1),
        ("data", 2, signal.SIGINT, 3),
        ("step", 4, signal.SIGTERM, 5),
        ("evaluate", 8, signal.SIGTERM, 8),
        ("save", 5, signal.SIGINT, 5),
        ("evaluate", STEPS, signal.SIGINT, STEPS),
    ],
)
def test_a_signal_stops_after_saving_and_the_rerun_goes_on(tmp_path, whole, capsys, section, step, number, saved):
    with at_section(section, step, signal_self(number)):
        assert train(tmp_path / "run", *FLAGS) is ExitReason.STOPPED
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped ({number.name}) after step {saved} of {STEPS}; it is saved: the same command again goes on from there"
    )
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == saved
    assert len(losses(tmp_path / "run")) == saved
    assert train(tmp_path / "run", *FLAGS) is ExitReason.COMPLETED
    assert lines(tmp_path / "run") == lines(whole)
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == STEPS


def test_a_signal_stops_a_sample_between_tokens(tmp_path, monkeypatch):
    """Nothing of it is written, and the rerun draws it whole."""
    made = []

    def add(self, token):
        made.append(token)
        if len(made) == 3:
            signal_self()()
        return original(self, token)

    original = Words.add
    monkeypatch.setattr(Words, "add", add)
    flags = ("--steps", 4, "--devices", 2, "--sample.every", 2, "--sample.prompt", "Story", "--sample.tokens", 40)
    assert train(tmp_path / "run", *flags) is ExitReason.STOPPED
    assert len(made) == 3
    assert len(losses(tmp_path / "run")) == 2
    samples = tmp_path / "run" / "samples.jsonl"
    assert not samples.exists()
    assert train(tmp_path / "run", *flags) is ExitReason.COMPLETED
    assert [json.loads(line)["step"] for line in samples.read_text().splitlines()] == [2, 4]


@pytest.mark.parametrize("when", ["between batches", "between evaluations"])
def test_a_signal_stops_the_evaluations_of_a_recipe(tmp_path, when):
    seen = []

    def first(context):
        for number, _ in enumerate(context.batches()):
            seen.append(number)
            if seen == [0] and when == "between batches":
                signal_self()()
        if when == "between evaluations" and "asked" not in seen:
            seen.append("asked")
            signal_self()()
        return {"batches": number + 1}

    def second(_):
        seen.append("second")
        return {"x": 1.0}

    hooks = Hooks(evaluations={"first": first, "second": second})
    flags = ("--devices", 2, "--steps", 2, "--data.held-out-documents", 1, "--evaluate.every", 2)
    assert train(tmp_path / "run", *flags, hooks=hooks) is ExitReason.STOPPED
    assert "second" not in seen
    if when == "between batches":
        assert seen == [0]
    assert "first/batches" not in lines(tmp_path / "run")[-1]
    assert train(tmp_path / "run", *flags, hooks=hooks) is ExitReason.COMPLETED
    assert lines(tmp_path / "run")[-1]["first/batches"] > 1
    assert lines(tmp_path / "run")[-1]["second/x"] == 1.0


def test_training_goes_on_when_the_reader_of_its_output_goes_away(tmp_path):
    """As `| head -1` does: after the first line the other end of the pipe is closed."""
    arguments = command(tmp_path / "run", "--devices", 2, "--steps", 30)
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=err)
        try:
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(120) == 0
        finally:
            process.kill()
            process.wait()
    assert (tmp_path / "err").read_text() == ""
    assert len(losses(tmp_path / "run")) == 30
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == 30


@pytest.mark.usefixtures("whole")
def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    inside = []

    def look():
        inside.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))

    with at_section("step", 1, look):
        train(tmp_path / "run", *FLAGS, "--steps", 2)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert inside
    assert not set(inside) & set(before)


def test_exit_codes_of_a_process(tmp_path, capsys):
    """75 after a signal, then 0; the process's own words."""
    arguments = command(tmp_path / "run", *FLAGS, "--steps", 4000)
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(arguments, env=environment(), stdout=out, stderr=err)
        try:
            wait_for_lines(process, tmp_path / "run", 3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == ExitReason.STOPPED.value == 75
        finally:
            process.kill()
            process.wait()
    done = len(losses(tmp_path / "run"))
    assert done >= 3
    last = (tmp_path / "out").read_text().splitlines()[-1]
    assert last.startswith(f"stopped (SIGTERM) after step {done} of 4,000; it is saved")
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert train(tmp_path / "run", *FLAGS, "--steps", done + 2) is ExitReason.COMPLETED
    assert len(losses(tmp_path / "run")) == done + 2
    out = capsys.readouterr().out
    assert f"resumed after step {done}" in out
    assert f"schedule: cosine decays over {done + 2} steps instead of 4000" in out


def test_the_second_signal_ends_at_once(tmp_path):
    """The first came while a step hangs: only the second helps. 128 + the number, as a shell has it."""
    hang = "import os, signal, time\nfrom small_runs import at_section\nimport sys\nfrom jaxscale.cli import main\n"
    body = "lambda: (print('hangs', flush=True), time.sleep(600))"
    source = f"{hang}with at_section('step', 1, {body}):\n    sys.exit(main(['train', *sys.argv[1:]]))\n"
    (tmp_path / "hang.py").write_text(source)
    arguments = command(tmp_path / "run", "--steps", 5, script=(str(tmp_path / "hang.py"), NANO))
    paths = {"PYTHONPATH": os.path.dirname(__file__)}
    process = subprocess.Popen(arguments, env=environment() | paths, stdout=subprocess.PIPE, text=True)
    try:
        assert any("hangs" in line for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
