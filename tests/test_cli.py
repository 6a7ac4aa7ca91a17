"""The command line: what it reads, what it refuses, what it says and how it exits."""

import errno
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError

from jaxscale import __version__
from jaxscale.cli import main
from jaxscale.commands.generate import GenerateCommand
from jaxscale.commands.parse import flags, parse_phase, parse_source
from jaxscale.commands.synonyms import SYNONYMS
from jaxscale.commands.train import TrainCommand, read
from jaxscale.config import Config, ConfigError, PhaseConfig, SourceConfig, to_text
from jaxscale.recipe import Hooks, load_recipe
from jaxscale.train.protocols import ExitReason, World

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "recipes" / "lm_tiny.py")


def config_of(*overrides: str) -> Config:
    return read([TINY, *overrides])[1].config


@pytest.fixture
def worker(monkeypatch):
    """Stands in for the training itself: records its call and does what the test tells it."""
    calls: list[tuple[Config, World | None, Hooks]] = []
    stand_in = types.SimpleNamespace(calls=calls, result=ExitReason.COMPLETED)

    def train(config, world, hooks):
        calls.append((config, world, hooks))
        if isinstance(stand_in.result, BaseException):
            raise stand_in.result
        return stand_in.result

    module = types.ModuleType("jaxscale.trainer")
    module.train = train
    monkeypatch.setitem(sys.modules, "jaxscale.trainer", module)
    monkeypatch.setattr("jaxscale.commands.train.quiet_terminal", lambda: None)
    return stand_in


# What it reads


def test_design_flags_reach_the_config():
    config = config_of(
        *shlex.split(
            """
            --steps 7 --seed 3 --devices 8 --on cpu-8 --mesh.tensor 2 --mesh.fsdp none --run.dir here
            --data.path a.jsonl --checkpoint.every 5 --precision.compute float32 --model.layers 6
            --optim.learning-rate 3e-3 --model.rope.theta 500000 --data.no-shuffle --model.window 64 0
            """
        )
    )
    assert (config.steps, config.seed, config.devices, config.on) == (7, 3, 8, "cpu-8")
    assert (config.mesh.tensor, config.mesh.fsdp) == (2, None)
    assert (config.run.dir, config.data.path, config.checkpoint.every) == ("here", "a.jsonl", 5)
    assert (config.precision.compute, config.optim.learning_rate) == ("float32", 3e-3)
    assert (config.model.layers, config.model.rope.theta, config.model.window) == (6, 500000.0, (64, 0))
    assert not config.data.shuffle


def test_without_flags_the_recipe_is_unchanged():
    assert config_of() == load_recipe(TINY).config


def test_a_mixture_takes_the_place_of_the_recipes_path_and_back():
    mixed = config_of("--data.mixture", "gs://bucket/a.jsonl:0.7", "b.jsonl").data
    assert mixed.path == ""
    assert mixed.mixture == (SourceConfig("gs://bucket/a.jsonl", 0.7), SourceConfig("b.jsonl", 1.0))
    assert config_of("--data.path", "other").data.path == "other"
    with pytest.raises(ConfigError, match="both set"):
        config_of("--data.path", "x", "--data.mixture", "y")


def test_phases():
    phases = config_of("--phases", "100:sequence=512,batch=4", "200:mixture=a:0.25+b:3").phases
    assert phases == (
        PhaseConfig(100, sequence=512, batch=4),
        PhaseConfig(200, mixture=(SourceConfig("a", 0.25), SourceConfig("b", 3.0))),
    )


def test_a_colon_without_a_number_belongs_to_the_path():
    assert parse_source("s3://bucket/file") == SourceConfig("s3://bucket/file")
    assert parse_phase("9") == PhaseConfig(9)


def test_profile_is_early_unless_steps_are_named():
    assert config_of("--profile").run.profile == "early"
    assert config_of("--profile", "--run.profile", "3:4").run.profile == "3:4"


@pytest.mark.parametrize(
    "words", [["train", TINY, "--help"], ["train", TINY, "--print-config"], ["--help"], ["--version"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_failure(words, unbuffered):
    """The other end of the pipe is closed before anything is written, as `| head` does at some point."""
    ours, theirs = os.pipe()
    os.close(ours)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "jaxscale", *words]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_pipe_that_is_not_our_output_is_told(worker, capsys):
    worker.result = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert main(["train", TINY]) == 1
    assert "BrokenPipeError" in capsys.readouterr().err


def test_the_flags_that_are_checked_are_those_of_the_help(capsys):
    with pytest.raises(SystemExit):
        read([TINY, "--help"])
    # A long flag stands on a line of its own; a pair of flags on one.
    printed = re.findall(r"^[│ ] (?:-h, )?(--\w[\w.-]+)(?:, (--\w[\w.-]+))?", capsys.readouterr().out, re.MULTILINE)
    in_help = {flag for pair in printed for flag in pair if flag} - {"--help"}
    assert in_help == set(flags(TrainCommand, TrainCommand(load_recipe(TINY).config)))


# What it says


def test_every_synonym_leads_to_a_flag_that_exists():
    known = {
        *flags(TrainCommand, TrainCommand(load_recipe(TINY).config)),
        *flags(GenerateCommand, GenerateCommand()),
    }
    endings = {
        name.lstrip("-").rpartition(".")[2] for name in flags(TrainCommand, TrainCommand(load_recipe(TINY).config))
    }
    assert {flag for targets in SYNONYMS.values() for flag in targets} <= known
    assert not endings & SYNONYMS.keys(), "a flag's own name is never taken for another's"
    for targets in SYNONYMS.values():
        assert len(targets) == 1 or {"--max-tokens", "--data.sequence"} >= set(targets), "one meaning for a command"


def test_help_teaches(capsys):
    assert main(["train", TINY, "--help"]) == 0
    out = capsys.readouterr().out
    for taught in (
        "The small transformer",
        "(default: 100)",
        "optim options",
        "examples:",
        "--mesh.tensor 2",
        "--print-config",
    ):
        assert taught in out
    assert main([]) == main(["--help"]) == main(["train", "--help"]) == main(["data"]) == 0
    assert "jaxscale generate" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxscale {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", TINY, "--stps", "3"], "unknown flag --stps; did you mean --steps?"),
        (["train", TINY, "--learning_rate=3"], "unknown flag --learning-rate; did you mean --optim.learning-rate?"),
        (["generate", "run", "--prompt", "--hello"], "if '--hello' is the value of --prompt, write --prompt=--hello"),
        (["train", TINY, "--keep", "5"], "did you mean --checkpoint.keep?"),
        (["train", TINY, "--model.layrs", "3"], "did you mean --model.layers?"),
        (["train", TINY, "--zzzzzzzz"], "nothing comes near it"),
        (["train", TINY, "--optim.lr", "5"], "did you mean --optim.learning-rate?"),
        (["train", TINY, "--wd=0.1"], "did you mean --optim.weight-decay?"),
        (["train", TINY, "--batch_size", "8"], "did you mean --data.batch?"),
        (["train", TINY, "--model.d-model", "8"], "did you mean --model.width?"),
        (["train", TINY, "--optim.steps", "8"], "did you mean --steps?"),
        (["generate", "somewhere", "--max-new-tokens", "3"], "did you mean --max-tokens?"),
        (["train", TINY, "steps"], "unexpected argument 'steps'"),
        (["train", TINY, "--steps", "many"], "--steps: 'many' is not a whole number"),
        (["train", TINY, "--steps"], "--steps"),
        (["train", TINY, "--mesh.tensor", "x"], "--mesh.tensor: 'x' is not a whole number or none"),
        (["train", TINY, "--optim.name", "sdg"], "invalid choice 'sdg'"),
        (["train", TINY, "--steps", "0"], "--steps is 0; a run has at least 1 step"),
        (["train", TINY, "--data.batch", "0"], "data.batch is 0"),
        (["train", TINY, "--train.microbatches", "3"], "a batch of 8 rows cannot be split into 3"),
        (["train", TINY, "--phases", "10:sequenc=3"], "'sequenc'; a phase can set sequence, batch and mixture"),
        (["train", TINY, "--phases", "soon"], "cannot read phase 'soon'"),
        (["train", TINY, "--data.mixture", "a:0"], "data source 'a' has weight 0"),
        (["train", TINY, "--distributed", "a,b"], "--distributed"),
        (["train", str(ROOT / "recipes" / "lm_tinny.py")], "lm_tiny.py?"),
        (["train"], "train needs a recipe"),
        (["trian"], "did you mean `jaxscale train`?"),
        (["data", "buld"], "did you mean `jaxscale data build`?"),
        (["data", "build", "x"], "missing: --out"),
        (["data", "build", "--ou", "y"], "did you mean --out?"),
        (["data", "build", "--out", "y"], "data build needs files"),
        (["generate", "somewhere"], "missing: --prompt"),
        (["generate", "somewhere", "--prompt", "x", "--temprature", "1"], "did you mean --temperature?"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, said, capsys, worker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())
    assert not worker.calls


def test_print_config_prints_and_does_not_train(capsys, worker):
    assert main(["train", TINY, "--print-config", "--steps", "9"]) == 0
    assert capsys.readouterr().out == to_text(config_of("--steps", "9"))
    assert not worker.calls


# How it exits


@pytest.mark.parametrize("reason", list(ExitReason))
def test_exit_code_of_a_run(reason, worker):
    worker.result = reason
    assert main(["train", TINY, "--steps", "5", "--distributed", "localhost:1234,2,1"]) == reason.value
    [(config, world, hooks)] = worker.calls
    assert config == config_of("--steps", "5")
    assert world == World(processes=2, index=1, address="localhost:1234")
    assert hooks == Hooks()


def test_only_completion_is_success():
    assert [reason for reason in ExitReason if reason.value == 0] == [ExitReason.COMPLETED]


class WordedByUs(RuntimeError):
    __module__ = "jaxscale.checkpoint"


@pytest.mark.parametrize(
    ("error", "code", "traced", "last"),
    [
        (ConfigError("no such mesh"), 2, False, "error: no such mesh"),
        (WordedByUs("the save failed"), 1, False, "error: the save failed"),
        (JaxRuntimeError("INTERNAL: Out of memory allocating 512 bytes.\nmore"), 1, False, "have no room on a device"),
        (JaxRuntimeError("INTERNAL: a bug"), 1, True, "error: JaxRuntimeError: INTERNAL: a bug"),
        (ZeroDivisionError("by zero"), 1, True, "error: ZeroDivisionError: by zero"),
        (AssertionError(), 1, True, "error: AssertionError"),
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), 1, False, "free some space"),
        (KeyboardInterrupt(), 130, False, "error: interrupted"),
    ],
)
def test_a_failure_ends_with_one_clear_line(error, code, traced, last, worker, capsys):
    worker.result = error
    assert main(["train", TINY]) == code
    lines = capsys.readouterr().err.splitlines()
    assert ("Traceback (most recent call last):" in lines) == traced
    assert last in lines[-1]
    assert traced or len(lines) == 1


def run_process(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, check=False)


def test_script_and_command_behave_the_same(tmp_path):
    overrides = ("--steps", "12", "--profile", "--mesh.tensor", "2", "--print-config")
    module, script = ("-m", "jaxscale", "train", TINY), (TINY,)
    results = [run_process(*form, *overrides, cwd=tmp_path) for form in (module, script)]
    assert results[0].stdout == results[1].stdout == to_text(config_of(*overrides))
    refused = [run_process(*form, "--stps", "1", cwd=tmp_path) for form in (module, script)]
    assert [result.returncode for result in results + refused] == [0, 0, 2, 2]
    assert refused[0].stderr.replace(f"jaxscale train {TINY}", f"python {TINY}") == refused[1].stderr


def test_a_typing_mistake_costs_no_heavy_import(tmp_path):
    recipe = tmp_path / "bare.py"
    recipe.write_text(
        "from jaxscale.config import Config, ModelConfig\nconfig = lambda: Config('bare', ModelConfig())\n"
    )
    code = f"""
import sys
from jaxscale.cli import main
assert main(["train", {str(recipe)!r}, "--stps", "1"]) == 2
assert main(["data", "build"]) == main(["generate"]) == 2
print({{"jax", "numpy", "rich", "orbax", "grain", "optax"}} & set(sys.modules))
"""
    result = run_process("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "set()\n"


def test_data_build_takes_the_token_that_ends_a_document(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Once more")
    out = str(tmp_path / "tokens")
    assert main(["data", "build", str(tmp_path / "a.txt"), "--out", out, "--end-of-document", "<eod>"]) == 2
    assert "has no token '<eod>'" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()
    assert main(["data", "build", str(tmp_path / "a.txt"), "--out", out]) == 0
