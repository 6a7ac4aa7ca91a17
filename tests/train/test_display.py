"""The display in plain text and on a terminal, the start summary, and what of the log reaches the terminal."""

import io
import itertools
import logging
import os
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.axes import abstract_mesh
from jaxscale.train.bar import fit
from jaxscale.train.display import LINE_SECONDS, Display, human_seconds, last_line
from jaxscale.train.logs import log_failure, quiet_terminal
from jaxscale.train.protocols import ExitReason
from jaxscale.train.summary import (
    Summary,
    bytes_per_device,
    human_bytes,
    human_count,
    summary_lines,
)

SUMMARY = Summary(
    name="lm_test",
    parameters=4_200_000,
    mesh="8 cpu devices: fsdp 8",
    bytes_per_device={"parameters": 3 << 20, "optimizer": 6 << 20},
    steps=100,
    rows=8,
    sequence=256,
    run_dir="runs/test",
    data="builtin",
    data_tokens=102_400,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def line(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 2.0, "grad_norm": 0.5, "tokens": 2048, "step_seconds": 0.5, **more}


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(display: Display, clock: Clock, steps: int, seconds: float) -> None:
    for step in range(1, steps + 1):
        for section in ("data", "step"):
            display.enter(section, step - 1)
        clock.now += seconds
        display.write(line(step))


# Plain text


def test_plain_lines_come_every_few_seconds_not_every_step(clock):
    out = io.StringIO()
    display = Display(100, stream=out, clock=clock)
    run(display, clock, 100, 0.5)
    display.close()
    steps = [int(found) for found in re.findall(r"^step (\d+)/100", out.getvalue(), re.MULTILINE)]
    assert steps[0] == 1
    assert steps[-1] == 100
    gaps = [(b - a) * 0.5 for a, b in itertools.pairwise(steps)]
    assert all(gap <= LINE_SECONDS for gap in gaps)
    assert all(gap >= LINE_SECONDS for gap in gaps[:-1])
    assert len(steps) < 15


def test_a_line_says_loss_speed_and_time_left(clock):
    out = io.StringIO()
    display = Display(100, stream=out, clock=clock, flops_per_token=1e6, peak=1e10)
    run(display, clock, 41, 0.5)
    last = out.getvalue().splitlines()[-1]
    # 2048 tokens in 0.5 s; 4096 * 1e6 FLOP/s of 1e10; 59 steps of 0.5 s are left.
    assert last == "step 41/100  loss 2.0000  grad norm 0.5  4,096 tokens/s  MFU 41.0%  30 s left"


def test_the_first_step_does_not_count_for_the_speed(clock):
    out = io.StringIO()
    display = Display(10, stream=out, clock=clock)
    display.write(line(1, step_seconds=500.0))
    assert "tokens/s" not in out.getvalue()
    display.write(line(2))
    assert display.seconds_left() == pytest.approx(8 * 0.5)


def test_without_a_known_peak_there_is_no_mfu(clock):
    out = io.StringIO()
    display = Display(10, stream=out, clock=clock, flops_per_token=1e6, peak=None)
    run(display, clock, 10, 1.0)
    display.close()
    assert "MFU" not in out.getvalue()


def test_close_prints_the_last_step_once(clock):
    out = io.StringIO()
    display = Display(1, stream=out, clock=clock)
    run(display, clock, 1, 1.0)
    display.finish("done")
    display.close()
    assert [text.split("  ")[0] for text in out.getvalue().splitlines()] == ["step 1/1", "done"]


def test_evaluations_compiling_and_messages_have_lines(clock):
    out = io.StringIO()
    display = Display(10, stream=out, clock=clock)
    display.enter("compile", 0)
    display.write(line(1))
    display.write(line(2, eval_loss=1.7512, eval_bits_per_byte=2.5, eval_tokens=250_210))
    display.message("by the way")
    said = out.getvalue()
    assert "compiling" in said.splitlines()[0]
    assert "step 2, evaluation: loss 1.751, bits per byte 2.5, tokens 250,210" in said
    assert "by the way\n" in said


def test_other_processes_say_nothing(clock):
    out = io.StringIO()
    display = Display(10, stream=out, clock=clock, enabled=False)
    display.start(SUMMARY)
    run(display, clock, 10, 10.0)
    display.message("text")
    display.finish("done")
    assert out.getvalue() == ""


def test_a_loss_that_is_no_number_is_shown(clock):
    out = io.StringIO()
    display = Display(1, stream=out, clock=clock)
    display.write(line(1, loss=float("nan"), grad_norm=float("inf")))
    assert "loss nan  grad norm inf" in out.getvalue()


# On a terminal


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    out = Terminal()
    display = Display(20, stream=out, clock=clock)
    display.start(SUMMARY)
    display.enter("compile", 0)
    run(display, clock, 12, 1.0)
    display.message("above [the] bar")
    display._bar.refresh()
    display.finish("done")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "12/20  loss 2.0000  grad norm 0.5  4,096 tokens/s  4 s left" in plain
    assert "above [the] bar" in plain
    assert plain.rstrip().endswith("done")
    assert plain.count("step 12/20") == 1  # one plain line stays when the bar is gone


def test_a_narrow_terminal_keeps_what_matters_most(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    display = Display(20, stream=out, clock=clock)
    display.start(SUMMARY)
    run(display, clock, 12, 1.0)
    display._bar.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert re.search(r"12/20  loss 2\.0000  4 s left\s*$", plain)
    display.finish("done")


@pytest.mark.parametrize(
    ("width", "kept"),
    [
        (99, "bar count loss norm left"),
        (35, "bar count loss left"),
        (34, "count loss left"),
        (13, "count left"),
        (1, "count"),
    ],
)
def test_the_least_important_parts_go_first(width, kept):
    ranks = {
        "bar": (5, " " * 15),
        "count": (0, "12/20"),
        "loss": (2, "loss"),
        "norm": (6, "norm"),
        "left": (1, "8 s l"),
    }
    shown = fit(list(ranks.values()), width)
    assert shown == [ranks[name] for name in kept.split()]


def test_a_dumb_terminal_gets_plain_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    display = Display(20, stream=out, clock=clock)
    display.start(SUMMARY)
    run(display, clock, 12, 1.0)
    assert "step 1/20  loss 2.0000" in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_what_a_model_says_does_not_steer_the_terminal(clock, monkeypatch, kind):
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "140")
    out = Terminal()
    display = Display(20, stream=out, clock=clock)
    display.start(SUMMARY)
    display.message("tab\t, \x1b]0;owned\x07 and \x9b2J\r over\nnext")
    display.finish("done")
    assert r"\x1b]0;owned\x07 and \x9b2J\x0d over" in out.getvalue()
    assert "\x1b]0;" not in out.getvalue()
    file = io.StringIO()
    Display(20, stream=file, clock=clock).message("a \x1b[1m b")
    assert file.getvalue() == "a \x1b[1m b\n"


def test_a_reader_that_goes_away_is_nothing_to_stop_for(clock):
    ours, theirs = os.pipe()
    out = os.fdopen(theirs, "w")
    display = Display(100, stream=out, clock=clock)
    display.start(SUMMARY)
    os.close(ours)
    run(display, clock, 100, 10.0)
    display.message("still here")
    display.finish("done")
    out.close()  # nothing is left in it that could fail


def test_a_stream_that_cannot_spell_it_gets_escapes():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Display(1, stream=out).message("caf\u00e9")
    assert raw.getvalue() == b"caf\\xe9\n"


# The summary


def test_summary_fits_a_screen_and_says_what_matters():
    text = "\n".join(summary_lines(SUMMARY))
    for part in (
        "lm_test",
        "4.2 M parameters",
        "fsdp 8",
        "parameters 3 MiB, optimizer 6 MiB",
        "8 rows x 256 = 2,048 tokens",
        "builtin: 102,400 tokens, 2 passes in 100 steps",
        "runs/test",
    ):
        assert part in text
    assert "resumed" not in text
    assert len(text.splitlines()) < 12


def test_summary_never_exceeds_20_lines():
    many = Summary(**{**vars(SUMMARY), "resumed_from": 40, "notes": tuple(f"note {i}" for i in range(50))})
    lines = summary_lines(many)
    assert len(lines) == 20
    assert "and 39 more lines" in lines[-1]
    assert any("resumed after step 40" in text for text in lines)


def test_bytes_per_device_follow_the_sharding():
    mesh = abstract_mesh({"fsdp": 8})

    def leaf(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    params = {"w": leaf((64, 16), P("fsdp", None)), "b": leaf((16,), P(None))}
    state = {"params": params, "opt": {"mu": params, "nu": params}, "step": leaf((), P())}
    numbers = 64 * 16 // 8 + 16
    assert bytes_per_device(state) == {"parameters": 4 * numbers, "optimizer": 8 * numbers, "gradients": 4 * numbers}
    assert bytes_per_device(state, reduce_dtype_bytes=2)["gradients"] == 2 * numbers
    assert "moving average" in bytes_per_device({**state, "ema": params})


def test_human_numbers():
    assert [human_bytes(n) for n in (10, 1536, 3 << 20, 5 << 30, 3 << 40)] == [
        "10 B",
        "1.5 KiB",
        "3 MiB",
        "5 GiB",
        "3 TiB",
    ]
    assert [human_count(n) for n in (999, 4.26e6, 8.03e9, 1e12)] == ["999", "4.26 M", "8.03 B", "1 T"]
    assert [human_seconds(n) for n in (8.2, 75, 7500)] == ["8 s", "1 min 15 s", "2 h 5 min"]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (ExitReason.COMPLETED, "done: 100 steps trained and saved in runs/x"),
        (ExitReason.STOPPED, "stopped (SIGTERM) after step 40 of 100; it is saved: the same command again goes on"),
        (ExitReason.FAILED, "failed after step 40 of 100; the log is in runs/x/logs"),
    ],
)
def test_last_line(reason, said):
    step = 100 if reason is ExitReason.COMPLETED else 40
    assert last_line(reason, step, 100, "runs/x", "SIGTERM").startswith(said)


# Logs


@pytest.fixture
def logs():
    """(terminal, file): the text of the terminal's handler and of one that stands for the run's log file."""
    terminal, file = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    level = root.level
    logging.captureWarnings(False)  # a command run before in this process may have left it on, past pytest's own reset
    handlers = [quiet_terminal(terminal), logging.StreamHandler(file)]
    root.addHandler(handlers[1])
    root.setLevel(logging.INFO)
    yield terminal, file
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def test_chatter_goes_to_the_file_and_errors_to_both(logs):
    terminal, file = logs
    for name in ("absl", "orbax.checkpoint", "grain"):
        logging.getLogger(name).warning("chatter of %s", name)
    logging.getLogger("jaxscale.train").info("a detail")
    logging.getLogger("jaxscale.train").warning("a warning of ours")
    logging.getLogger("orbax.checkpoint").error("a real error")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("deprecated", stacklevel=1)
    assert terminal.getvalue().splitlines() == [
        "WARNING jaxscale.train: a warning of ours",
        "ERROR orbax.checkpoint: a real error",
    ]
    for text in ("chatter of absl", "chatter of grain", "a detail", "a real error", "deprecated"):
        assert text in file.getvalue()


def test_a_traceback_goes_to_the_file_only(logs):
    terminal, file = logs
    log_failure(ValueError("bad"))
    assert "ValueError: bad" in file.getvalue()
    assert terminal.getvalue() == ""
