"""Whatever is wrong with what a run is given: one clear error line, a non-zero exit code, and nothing half-written.

The command runs in this process, through the function that `jaxscale` and every recipe call.
"""

import gzip
import json
import logging
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
from small_runs import NANO, ROOT, SMALL, at_section, command, config_of, losses, run, train

from jaxscale import trainer
from jaxscale.checkpoint.restore import list_steps
from jaxscale.cli import main
from jaxscale.data.corpus import held_out_documents
from jaxscale.data.token_file import is_token_folder, open_token_file
from jaxscale.train.protocols import ExitReason, World

REFUSED, FAILED = 2, 1


@pytest.fixture(name="jaxscale")
def _jaxscale(capsys):
    """Runs `jaxscale train RECIPE SMALL ...` and returns its exit code and what it printed on stderr."""
    handlers = list(logging.getLogger().handlers)

    def call(*flags, recipe=NANO):
        capsys.readouterr()
        code = main(["train", str(recipe), *SMALL, "--steps", "2", *map(str, flags)])
        return code, capsys.readouterr().err.strip()

    yield call
    logging.getLogger().handlers[:] = handlers


def write_text(folder, documents, name="text.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def tree(folder):
    """Every file below a folder and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Flags, meshes and models


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.learning-rat", "1"], "unknown flag --optim.learning-rat; did you mean --optim.learning-rate?"),
        (["--stepz", "1"], "unknown flag --stepz; did you mean --steps?"),
        (["--steps", "many"], "--steps: 'many' is not a whole number"),
        (["--optim.learning-rate", "inf"], "--optim.learning-rate: 'inf' is not a number"),
        (["--steps", "0"], "--steps is 0; a run has at least 1 step"),
        (["--devices", "4", "--mesh.tensor", "3"], "mesh stage 1 x data 1 x fsdp 1 x expert 1 x context 1 x tensor 3"),
        (["--devices", "4", "--mesh.tensor", "4"], "mesh axis 'tensor' (4) does not divide"),
        (["--devices", "3", "--model.width", "32"], "mesh axis 'fsdp' (3) does not divide"),
        (["--devices", "2", "--mesh.stage", "2"], "mesh axis 'stage' (2) does not divide layers"),
        (
            ["--devices", "3", "--mesh.context", "3"],
            "mesh axis 'context' (3) does not divide the sequence (32, data.sequence)",
        ),
        (["--on", "cpu-9"], "cpu-9"),
        (["--on", "v5e-256"], "256"),
        (["--data.batch", "4", "--train.microbatches", "8"], "a batch of 4 rows cannot be split into 8"),
        (["--model.heads", "3"], "model.width 32 is not a multiple of model.heads 3"),
        (["--model.vocabulary", "100"], "beyond the model's vocabulary of 100; set model.vocabulary to at least 257"),
        (["--run.profile", "9"], "run.profile is '9'; use FIRST:LAST"),
        (["--init-from", "nowhere@3"], "nowhere has no checkpoints; give the directory of a run that saved one"),
        (["--sample.every", "2"], "sample.every is set but sample.prompt is empty; give a prompt"),
        (
            ["--model.attention", "cudnn"],
            "model.attention is cudnn, but the cudnn kernel runs on gpu only and this is cpu",
        ),
        (["--model.attention", "splash"], "model.attention is splash, but the splash kernel runs on tpu only"),
        (
            ["--model.attention", "splash", "--data.sequence", "128", "--model.head-dim", "64"],
            "the splash kernel runs on tpu only and this is cpu; use auto, or set model.attention=xla",
        ),
        (
            ["--data.mixture", "a.jsonl:inf", "b.jsonl:1"],
            "data source 'a.jsonl' has weight inf; weights are positive and",
        ),
        (
            ["--evaluate.every", "2"],
            "evaluate.every is 2, but no documents are held out and the recipe has no evaluations",
        ),
    ],
)
def test_settings_that_cannot_work(tmp_path, jaxscale, flags, message):
    code, text = jaxscale("--run.dir", tmp_path / "run", *flags)
    print(text)
    assert code == REFUSED
    assert text.startswith("error: ")
    assert message in text
    assert all(line.startswith("  - ") for line in text.splitlines()[1:]), "more than one error, or one and its list"
    assert not (tmp_path / "run").exists()


def test_a_tracker_whose_package_is_missing(tmp_path, jaxscale, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, text = jaxscale("--run.dir", tmp_path / "run", "--run.track", "wandb")
    assert code == REFUSED
    assert text.startswith("error: run.track names 'wandb', which needs the package 'wandb'; install it with")
    assert not (tmp_path / "run").exists()


def test_the_process_says_the_same(tmp_path):
    result = run(command(tmp_path / "run", "--devices", 2, "--mesh.tensor", 3))
    assert result.returncode == REFUSED
    assert result.stdout == ""
    assert result.stderr.startswith("error: mesh ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepz", "1"], "unknown flag --stepz"),
        (["--optim.clip", "-1"], "optim.clip is -1"),
        (["--model.heads", "3"], "model.width 32 is not a multiple of model.heads 3"),
        (["--data.path", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["--devices", "3"], "3 emulated devices cannot be dealt out to 2 processes"),
        (["--devices", "2", "--mesh.tensor", "4"], "tensor 4 = 4 does not match 2 devices"),
        (["--on", "cpu-9"], "cpu-9"),
    ],
)
def test_one_of_two_processes_refuses_what_it_can_before_it_waits_for_the_other(
    tmp_path, jaxscale, monkeypatch, flags, message
):
    monkeypatch.setattr(trainer, "membership", lambda _: pytest.fail("it waits for the other one"))
    code, text = jaxscale("--run.dir", tmp_path / "run", "--distributed", "127.0.0.1:9,2,1", *flags)
    assert code == REFUSED
    assert text.startswith("error: ")
    assert message in text
    assert not (tmp_path / "run").exists()


def test_token_files_are_there_before_the_world_forms(tmp_path, monkeypatch):
    """Nobody waits in a collective for a process that still tokenises."""
    cache = tmp_path / "cache"
    path = write_text(tmp_path, ["Once more unto the breach, dear friends, once more"] * 40)

    class Forming(Exception):
        pass

    def membership(_):
        (built,) = (folder for folder in cache.rglob("*") if is_token_folder(folder))
        raise Forming(len(open_token_file(built).offsets) - 1)

    monkeypatch.setattr(trainer, "prepare_backend", lambda *_: None)
    monkeypatch.setattr(trainer, "membership", membership)
    config = config_of("--run.dir", tmp_path / "run", "--data.path", path, "--data.cache", cache)
    with pytest.raises(Forming, match=r"^40$"):
        trainer.train(config, World(2, 1, "127.0.0.1:9"))
    assert not (tmp_path / "run").exists()


# Data


def missing(folder):
    return folder / "nothing.jsonl"


def empty(folder):
    (folder / "empty.jsonl").touch()
    return folder / "empty.jsonl"


def no_text(folder):
    (folder / "other.jsonl").write_text('{"content": "words"}\n')
    return folder / "other.jsonl"


def truncated(folder):
    data = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))
    (folder / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    return folder / "cut.jsonl.gz"


def latin_1(folder):
    (folder / "latin.txt").write_bytes("Grüße aus Köln\n".encode("latin-1") * 100)
    return folder / "latin.txt"


def too_short(folder):
    return write_text(folder, ["short"])


def nothing_to_predict(folder):
    return write_text(folder, [""] * 3000)


def unbuilt_folder(folder):
    (folder / "tokens").mkdir()
    return folder / "tokens"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "nothing.jsonl"),
        (empty, "empty.jsonl"),
        (no_text, "text"),
        (truncated, "cut.jsonl.gz"),
        (latin_1, "UTF-8"),
        (too_short, "one sequence of 32 takes 33"),
        (
            nothing_to_predict,
            "has nothing to learn from: no row of 32 tokens has one to predict; its 3000 documents are",
        ),
        (unbuilt_folder, "tokens"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, jaxscale, make, message):
    code, text = jaxscale("--run.dir", tmp_path / "run", "--data.path", make(tmp_path))
    print(text)
    assert code == REFUSED
    assert text.startswith("error: ")
    assert message in text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_one_corpus_of_a_mixture_that_cannot_be_used(tmp_path, jaxscale):
    bad, good = nothing_to_predict(tmp_path), write_text(tmp_path, ["words and more words"] * 100, "good.jsonl")
    for mixture in ([good, bad], [f"{bad}:0.001", good]):
        code, text = jaxscale("--run.dir", tmp_path / "run", "--data.mixture", *mixture)
        assert code == REFUSED
        assert text.startswith(f"error: corpus {bad} has nothing to learn from")
        assert not (tmp_path / "run").exists()


def test_held_out_documents_without_text(tmp_path, jaxscale):
    held = held_out_documents(100, 3)
    path = write_text(tmp_path, ["" if n in held else "words and more words" for n in range(100)])
    flags = ("--data.path", path, "--data.held-out-documents", 3, "--evaluate.every", 1)
    code, text = jaxscale("--run.dir", tmp_path / "run", *flags)
    assert code == REFUSED
    assert "evaluate.every is 1, but the 3 held-out documents are empty" in text
    assert not (tmp_path / "run").exists()


# A run directory that is there already


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory):
    """A finished run of 2 steps on a text of its own. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_text(folder, [f"{n} green bottles hanging on the wall" * 3 for n in range(40)])
    assert train(folder / "run", "--steps", 2, "--devices", 1, "--data.path", path) is ExitReason.COMPLETED
    return folder


def other_text(folder):
    path = write_text(folder, [f"{n} red bottles hanging on the wall" * 3 for n in range(40)])
    return ["--data.path", path]


TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "bottles": 1, "<|endoftext|>": 2}, "unk_token": "<unk>"},
    "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [
        {
            "id": 2,
            "content": "<|endoftext|>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ],
}


def other_tokenizer(folder):
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return ["--data.tokenizer", folder / "tokenizer.json"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            lambda _: ["--model.width", 64, "--model.mlp", 128],
            ["layers/mlp/", "checkpoint float32[", "this run float32[", "use the model and optimizer settings"],
        ),
        (lambda _: ["--optim.name", "sgd"], ["opt/", "absent"]),
        (other_text, ["this is not the data that the checkpoint was trained on (corpus ", "--init-from"]),
        (other_tokenizer, ["tokenizer: bytes (", " -> WordLevel-3 (", "--init-from"]),
        (lambda _: ["--data.held-out-documents", 1], ["held-out documents: 0 -> 1"]),
        (lambda _: ["--data.batch", 4], ["rows in another order (data.batch: 8 -> 4)", "keep these as they were"]),
        (lambda _: ["--data.sequence", 16], ["rows in another order (data.sequence: 32 -> 16)"]),
        (lambda _: ["--seed", 3], ["rows in another order (seed: 0 -> 3)"]),
        (lambda _: ["--data.no-shuffle"], ["rows in another order (data.shuffle: True -> False)"]),
    ],
    ids=["shapes", "optimizer", "data", "tokenizer", "held out", "batch", "sequence", "seed", "order"],
)
def test_a_resume_of_something_else(tmp_path, jaxscale, trained, flags, parts):
    folder = shutil.copytree(trained / "run", tmp_path / "run")
    before = tree(folder)
    path = ["--data.path", trained / "text.jsonl"]
    code, text = jaxscale("--run.dir", folder, "--devices", 1, "--steps", 3, *path, *flags(tmp_path))
    print(text)
    assert code == REFUSED
    assert text.startswith("error: ")
    assert all(part in text for part in parts), text
    after = tree(folder)
    assert {k: v for k, v in after.items() if not k.startswith(("logs/", ".lock"))} == {
        k: v for k, v in before.items() if not k.startswith(("logs/", ".lock"))
    }


def test_the_run_directory_of_another_recipe(tmp_path, jaxscale, trained):
    folder = shutil.copytree(trained / "run", tmp_path / "run")
    code, text = jaxscale("--run.dir", folder, recipe=ROOT / "recipes" / "lm_tiny.py")
    assert code == REFUSED
    assert text.startswith(f"error: {folder} is the run directory of another recipe: it trains 'lm_nano', this is 'lm_")
    assert len(text.splitlines()) == 1


def test_a_folder_of_something_else(tmp_path, jaxscale):
    (tmp_path / "thesis.tex").touch()
    code, text = jaxscale("--run.dir", tmp_path)
    assert code == REFUSED
    assert "is not a run directory: it holds thesis.tex and no config.json" in text
    assert set(tree(tmp_path)) == {"thesis.tex"}


def test_a_second_run_in_the_same_directory(tmp_path):
    """Refused while the first trains, which does not notice."""
    seen = []

    def second():
        result = run(command(tmp_path / "run", "--steps", 2))
        seen.append((result.returncode, result.stderr.strip(), result.stdout))

    with at_section("step", 1, second):
        assert train(tmp_path / "run", "--steps", 3, "--devices", 1) is ExitReason.COMPLETED
    ((code, text, out),) = seen
    assert (code, out) == (REFUSED, "")
    assert text.startswith(f"error: {tmp_path / 'run'} is in use by another run (pid ")
    assert len(text.splitlines()) == 1
    assert len(losses(tmp_path / "run")) == 3


# Recipes


@pytest.mark.parametrize(
    ("source", "code", "message", "traceback"),
    [
        (None, REFUSED, "error: there is no recipe file", False),
        ("x = 1\n", REFUSED, "is not a recipe: it has no function config()", False),
        ("def config(:\n", FAILED, "error: SyntaxError: ", True),
        ("import not_a_package\n", FAILED, "error: ModuleNotFoundError: No module named 'not_a_package'", True),
        ("def config():\n    return 1 / 0\n", FAILED, "error: ZeroDivisionError: division by zero", True),
        ("def config():\n    return 1\n", REFUSED, "returned int; return a jaxscale.config.Config", False),
    ],
)
def test_a_recipe_that_cannot_be_read(tmp_path, jaxscale, source, code, message, traceback):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    found, text = jaxscale("--run.dir", tmp_path / "run", recipe=tmp_path / "mine.py")
    print(text)
    assert found == code
    assert message in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith("error: ")
    assert ("Traceback" in text) == traceback
    assert not traceback or "mine.py" in text
    assert not (tmp_path / "run").exists()


def test_a_recipe_whose_loss_raises(tmp_path, jaxscale):
    """The traceback shows the user's own line; the last line says what; what is written is a run that never trained."""
    source = """
    import importlib.util
    from dataclasses import dataclass
    from jaxscale.models.transformer_config import TransformerConfig
    from jaxscale.config import *

    class Broken:
        def __init__(self, task):
            self._task = task

        def __getattr__(self, name):
            return getattr(self._task, name)

        def loss(self, params, batch, key):
            return batch["no such thing"], {}

    @dataclass(frozen=True)
    class Mine(TransformerConfig):
        def task(self, config):
            return Broken(super().task(config))

    def config():
        return Config(name="mine", model=Mine(), data=DataConfig(path="builtin"))
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(source))
    code, text = jaxscale("--run.dir", tmp_path / "run", recipe=tmp_path / "mine.py")
    assert code == FAILED
    assert text.splitlines()[-1] == "error: KeyError: 'no such thing'"
    assert 'return batch["no such thing"], {}' in text
    assert not (tmp_path / "run" / "checkpoints").exists() or list_steps(tmp_path / "run" / "checkpoints") == []
    assert losses(tmp_path / "run") == []


# A full disk


@pytest.fixture(name="disk")
def _disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a tiny file system is not allowed here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        for _ in range(50):
            if subprocess.run(["umount", path], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)


def fill(disk, leave=0):
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


def test_a_disk_that_gets_full_between_lines(disk, jaxscale):
    folder = disk / "run"
    with at_section("step", 4, lambda: fill(disk)):
        code, text = jaxscale("--run.dir", folder, "--steps", 4000, "--checkpoint.every", 3, "--devices", 1)
    print(text)
    assert code == FAILED
    assert text.splitlines()[-1].startswith("error: ")
    assert "the disk is full; make room, the same command then goes on" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    (disk / "ballast").unlink()
    done = len(losses(folder))
    assert done >= 4
    code, text = jaxscale("--run.dir", folder, "--steps", done + 1, "--checkpoint.every", 3, "--devices", 1)
    assert code == 0, text
    assert len(losses(folder)) == done + 1


def test_a_disk_that_has_no_room_for_the_last_checkpoint(disk, jaxscale):
    folder = disk / "run"
    with at_section("finish", 4, lambda: fill(disk, leave=16384)):
        code, text = jaxscale("--run.dir", folder, "--steps", 4, "--devices", 1)
    print(text)
    assert code == FAILED
    assert text.splitlines()[-1].startswith("error: the state after step 4 could not be saved: the disk that holds ")
    assert "make room or repair the disk; the same command then goes on" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert list_steps(folder / "checkpoints") == []
    (disk / "ballast").unlink()
    assert jaxscale("--run.dir", folder, "--steps", 4, "--devices", 1)[0] == 0
    assert len(losses(folder)) == 4
    assert list_steps(folder / "checkpoints") == [4]


def test_a_disk_without_room_for_a_run(disk, jaxscale):
    fill(disk)
    code, text = jaxscale("--run.dir", disk / "run", "--steps", 2, "--devices", 1)
    print(text)
    assert code != 0
    assert text.splitlines()[-1].startswith("error: ")
    assert "cannot be used: No space left on device; repair that, or give another --run.dir" in text
    assert len(text.splitlines()) == 1
    assert not (disk / "run").exists()
