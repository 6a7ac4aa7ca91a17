"""What a start costs and shows: imports that make nothing, one screen, a wheel that trains outside the repository."""

import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
from small_runs import ROOT, SMALL, command, config_of, environment, last_line, losses, run, train

import jaxscale
from jaxscale import trainer
from jaxscale.train.protocols import ExitReason


def test_the_first_screen_has_at_most_20_lines(tmp_path):
    flags = ("--steps", 2, "--devices", 8, "--mesh.tensor", 2, "--train.microbatches", 2, "--optim.ema", 0.9)
    result = run(command(tmp_path / "run", *flags))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    before = result.stdout.partition("step 1/2")[0].splitlines()
    assert 5 <= len(before) <= 20
    assert before[0] == "lm_nano"
    assert any("8 cpu devices: fsdp 4 x tensor 2" in line for line in before)
    # A resume with other settings has more to say, and still fits.
    other = ("--optim.learning-rate", 2e-3, "--optim.b1", 0.8, "--optim.b2", 0.9, "--optim.clip", 2)
    more = ("--optim.epsilon", 1e-7, "--optim.final", 0.2, "--optim.weight-decay", 0.2, "--train.z-loss", 1e-4)
    result = run(command(tmp_path / "run", *flags[2:], *other, *more, "--steps", 3))
    assert result.returncode == 0, result.stderr
    before = result.stdout.partition("step 3/3")[0].splitlines()
    assert len(before) <= 20
    assert "  config: optim.b1: 0.9 -> 0.8" in before


def test_a_line_of_a_run_shows_the_mfu_of_its_model_on_its_devices(tmp_path, capsys, monkeypatch):
    """The measured peak of this machine, and FLOPs of the model's formula: at 100 tokens/s the MFU would be 1 here."""
    config = config_of("--devices", 2)
    flops = config.model.task(config).flops_per_token(config.data.sequence)
    peaks = []

    def peak_flops(devices, dtype):
        peaks.append((len(devices), dtype, original(devices, dtype)))
        return 100 * flops

    original = trainer.peak_flops
    monkeypatch.setattr(trainer, "peak_flops", peak_flops)
    assert train(tmp_path / "run", "--steps", 6, "--devices", 2) is ExitReason.COMPLETED
    (measured,) = peaks
    assert measured[:2] == (2, "float32")
    assert measured[2] > 1e8, "a processor of this century"
    shown = re.search(r"step 6/6  loss .*  ([\d,]+) tokens/s  MFU ([\d.]+)%", capsys.readouterr().out)
    assert shown, "no line of the run shows tokens/s and MFU"
    assert float(shown[2]) == pytest.approx(float(shown[1].replace(",", "")), abs=0.6)


def test_importing_every_module_makes_no_backend_no_thread_and_no_array():
    extras = {"jaxscale.__main__"}
    names = [m.name for m in pkgutil.walk_packages(jaxscale.__path__, "jaxscale.") if m.name not in extras]
    assert {"jaxscale.trainer", "jaxscale.worker", "jaxscale.checkpoint.durable", "jaxscale.train.step"} <= set(names)
    code = f"""
import importlib, threading
for name in {names!r}:
    importlib.import_module(name)
    assert threading.active_count() == 1, (name, threading.enumerate())
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend"
"""
    result = run([sys.executable, "-c", code])
    assert result.returncode == 0, last_line(result)


def test_import_jaxscale_is_light():
    code = "import sys, jaxscale; print(sorted({'jax', 'numpy', 'tyro', 'orbax', 'grain', 'optax'} & set(sys.modules)))"
    result = run([sys.executable, "-c", code])
    assert (result.returncode, result.stdout) == (0, "[]\n")


def test_the_wheel_trains_outside_the_repository(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed here: pip install -e '.[dev]' installs it")
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode:
        pytest.skip("this is no git checkout, so which files belong to the package is not known")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file() and name.startswith(("jaxscale/", "pyproject.toml", "README.md")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    result = run(build)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("jaxscale-*.whl")
    result = run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)])
    assert result.returncode == 0, result.stderr
    elsewhere.mkdir()
    shutil.copy(ROOT / "recipes" / "lm_nano.py", elsewhere / "mine.py")
    variables = environment() | {"PYTHONPATH": str(site)}

    def call(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=elsewhere,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    where = call("-c", "import jaxscale; print(jaxscale.__file__)")
    assert where.stdout.startswith(str(site)), where.stdout
    result = call("mine.py", *SMALL, "--steps", 2, "--on", "cpu-8", "--run.dir", "run")
    assert result.returncode == 0, result.stderr
    assert "8 cpu devices: fsdp 8" in result.stdout
    assert len(losses(elsewhere / "run")) == 2
    result = call("-m", "jaxscale", "train", "mine.py", *SMALL, "--steps", 2, "--on", "cpu-8", "--run.dir", "run")
    assert (result.returncode, result.stdout.splitlines()[-1][:13]) == (0, "nothing to do"), result.stderr
    assert (site / "jaxscale" / "py.typed").exists()
