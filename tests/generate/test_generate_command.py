"""`jaxscale generate` on a run directory that training left."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from jaxscale.checkpoint.layout import COMMIT_FILE
from jaxscale.checkpoint.restore import restore_params
from jaxscale.cli import main
from jaxscale.commands.generate import _print
from jaxscale.config import Config, DataConfig, MeshConfig, OptimConfig, PrecisionConfig, RematConfig, RunConfig
from jaxscale.data.tokenizer import load_tokenizer
from jaxscale.generate.load import find_step, load_run
from jaxscale.generate.text import generate_text
from jaxscale.mesh import make_mesh
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.testing.checkpoints import rewrite
from jaxscale.train.protocols import World
from jaxscale.trainer import train

FLAGS = ["--max-tokens", "24", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "3"]
SETTINGS = {"tokens": 24, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 3 steps with checkpoints of steps 2 and 3 and an average of the weights that is far behind them."""
    jax.devices()  # the backend has the 8 devices of all tests, before a run of 2 could make one of its own
    folder = tmp_path_factory.mktemp("runs") / "run"
    corpus = folder.parent / "corpus.txt"
    corpus.write_text("Once more unto the breach, dear friends, once more. " * 40)
    config = Config(
        name="generated",
        model=TransformerConfig(vocabulary=264, layers=2, width=32, heads=4, kv_heads=2, mlp=48, tied=True),
        steps=3,
        devices=2,
        mesh=MeshConfig(fsdp=2),
        data=DataConfig(path=str(corpus), sequence=64, batch=4, cache=str(folder.parent / "cache")),
        optim=OptimConfig(learning_rate=0.05, ema=0.9),
        precision=PrecisionConfig(compute="float32"),
        remat=RematConfig(policy="none"),
        run=RunConfig(dir=str(folder)),
    )
    for steps in (2, 3):
        train(replace(config, steps=steps), World())
    return folder, replace(config, devices=0, mesh=MeshConfig())


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setattr("jaxscale.commands.generate.quiet_terminal", lambda: None)


def generated(capsys, *arguments, note=""):
    assert main(["generate", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(note)
    assert bool(captured.err) == bool(note)
    return captured.out


def expected(run, step, branch, prompts):
    """What the weights of a checkpoint say, read without the code under test."""
    folder, config = run
    with jax.set_mesh(make_mesh(config, jax.devices()[:1])):
        task = config.model.task(config)
        abstract = jax.eval_shape(task.init, jax.random.key(0))
        params = restore_params(folder / "checkpoints", step, abstract, average=branch == "ema")
        return generate_text(task, params, load_tokenizer(folder / "tokenizer"), prompts, **SETTINGS)


@pytest.fixture(scope="module")
def once(run):
    (text,) = expected(run, 3, "ema", ["Once "])
    return text


def test_prompt_and_continuation_of_the_newest_average_and_nothing_else(run, once, capsys):
    assert generated(capsys, run[0], "--prompt", "Once ", *FLAGS) == f"Once {once}\n"
    (weights,) = expected(run, 3, "params", ["Once "])
    assert weights != once, "the test could not tell the weights from their average"


def test_an_older_step(run, once, capsys):
    (older,) = expected(run, 2, "ema", ["Once "])
    assert older != once
    assert generated(capsys, run[0], "--prompt", "Once ", "--step", "2", *FLAGS) == f"Once {older}\n"


@pytest.mark.parametrize(
    "mesh", [["--mesh.tensor", "2"], ["--mesh.data", "4"], ["--mesh.fsdp", "2", "--mesh.tensor", "2"]]
)
def test_any_mesh_says_the_same(run, once, capsys, mesh):
    devices = 2 if len(mesh) == 2 and "tensor" in mesh[0] else 4
    assert generated(capsys, run[0], "--prompt", "Once ", "--devices", devices, *mesh, *FLAGS) == f"Once {once}\n"
    assert generated(capsys, run[0], "--prompt=Once ", "--on", "cpu-8", *FLAGS) == f"Once {once}\n"


def test_a_run_trained_with_a_kernel_of_other_devices(run, once, capsys, tmp_path):
    """Generation has an attention of its own, so a run of a GPU or a TPU generates anywhere."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    step = folder / "checkpoints" / "3"
    saved = json.loads((step / "config.json").read_text())
    saved["model"]["attention"] = "cudnn"
    rewrite(step, "config.json", json.dumps(saved))
    assert generated(capsys, folder, "--prompt", "Once ", *FLAGS) == f"Once {once}\n"


def test_prompt_from_a_file(run, once, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once ")
    assert generated(capsys, run[0], "--prompt-file", tmp_path / "prompt.txt", *FLAGS) == f"Once {once}\n"


def test_several_samples_one_after_the_other(run, once, capsys):
    texts = expected(run, 3, "ema", ["Once "] * 3)
    assert texts[0] == once
    assert len(set(texts)) == 3
    out = generated(capsys, run[0], "--prompt", "Once ", "--samples", "3", *FLAGS)
    assert out == "\n".join(f"Once {text}\n" for text in texts)


def test_an_empty_prompt_starts_a_document(run, capsys):
    (text,) = expected(run, 3, "ema", [""])
    assert generated(capsys, run[0], "--prompt", "", *FLAGS) == f"{text}\n"


def test_rows_longer_than_the_training_are_noted(run, capsys):
    note = "note: 5 tokens of prompt and up to 80 more; the model was trained on rows of 64 tokens"
    assert generated(capsys, run[0], "--prompt", "Once ", "--max-tokens", "80", note=note).startswith("Once ")


def test_matrices_are_kept_in_the_compute_dtype(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    step = folder / "checkpoints" / "3"
    saved = json.loads((step / "config.json").read_text())
    saved["precision"]["compute"] = "bfloat16"
    rewrite(step, "config.json", json.dumps(saved))
    loaded = load_run(folder, find_step(folder, None), on="", devices=1, mesh=MeshConfig())
    assert loaded.params["layers"]["attention"]["q"].dtype == loaded.params["embed"]["table"].dtype == "bfloat16"
    assert loaded.params["layers"]["mlp_norm"]["scale"].dtype == loaded.params["norm"]["scale"].dtype == "float32"


def test_bad_input_gets_one_line_and_exit_code_2(run, capsys, tmp_path):
    folder = run[0]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    empty = tmp_path / "empty"
    empty.mkdir()
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json").write_text("{}")
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    for step in ("2", "3"):
        (torn / "checkpoints" / step / COMMIT_FILE).unlink()
    for arguments, said in (
        ([tmp_path / "nowhere", "--prompt", "x"], "is not a run directory: it is not there"),
        ([empty, "--prompt", "x"], "is not a run directory: it has no config.json"),
        ([tmp_path / "latin.txt", "--prompt", "x"], "is not a run directory"),
        ([new, "--prompt", "x"], "has no checkpoint yet"),
        ([torn, "--prompt", "x"], "has no checkpoint yet"),
        ([folder, "--prompt", "x", "--step", "7"], "has no checkpoint of step 7; it has 2, 3"),
        ([folder, "--prompt", "x", "--step", "new"], "'new' is not a whole number"),
        ([folder], "missing: --prompt TEXT (or --prompt-file FILE)"),
        ([folder, "--prompt", "x", "--prompt-file", "y"], "give one of the two"),
        ([folder, "--prompt-file", tmp_path / "none.txt"], "cannot be read: No such file"),
        ([folder, "--prompt-file", tmp_path / "latin.txt"], "is not UTF-8 (byte 3)"),
        ([folder, "--prompt-file", ""], "--prompt-file is empty; name a file, or - for"),
        ([folder, "--prompt", "x", "--samples", "0"], "--samples is 0; use 1 or more"),
        ([folder, "--prompt", "x", "--max-tokens", "0"], "--max-tokens is 0; use 1 or more"),
        ([folder, "--prompt", "x", "--top-p", "0"], "top-p is 0.0"),
        ([folder, "--prompt", "x", "--mesh.tensr", "2"], "did you mean --mesh.tensor?"),
        ([folder, "--prompt", "x", "--devices", "3", "--mesh.tensor", "2"], "does not match 3 devices"),
    ):
        assert main(["generate", *map(str, arguments)]) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == "", "nothing is printed before all is known to be right"
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert said in captured.err


def test_heads_that_the_mesh_does_not_divide(run, capsys):
    assert main(["generate", str(run[0]), "--prompt", "x", "--devices", "4", "--mesh.tensor", "4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "mesh axis 'tensor' (4) does not divide kv_heads (2)" in captured.err


def test_the_text_appears_while_it_is_generated(run):
    """The reader of a pipe sees the prompt and tokens before the process has ended, and may leave."""
    command = [sys.executable, "-m", "jaxscale", "generate", str(run[0]), "--prompt", "Once ", "--max-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.read(12).startswith(b"Once ")
            process.stdout.close()
            assert process.wait(60) == 0  # it has given what was wanted, long before 100,000 tokens
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(("is_terminal", "said"), [(True, r"a\x1b[2J b"), (False, "a\x1b[2J b")])
def test_a_terminal_is_not_steered_and_a_file_has_the_text_as_it_is(is_terminal, said, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdout", out)
    _print("a\x1b[2J b")
    assert out.getvalue() == said
