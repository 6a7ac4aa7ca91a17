"""scripts/setup decides rightly whether there is something to do; constraints.txt and the rules of the house hold."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A checkout with what scripts/setup reads, and an environment whose pip only notes how it was called."""
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt", ".python-version"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
if [ "$1" = -m ]; then echo "$@" >>"{tmp_path}/pip-calls"; else exec {sys.executable} "$@"; fi
"""
    )
    python.chmod(0o755)
    return tmp_path


def setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", checkout / "scripts" / "setup"]
    # The Python that runs the tests is the one to be found.
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": path}, check=False)


def installs(checkout: Path) -> int:
    calls = checkout / "pip-calls"
    return calls.read_text().count("pip install") if calls.exists() else 0


def test_setup_does_nothing_the_second_time_and_notices_changes(checkout):
    first = setup(checkout)
    assert first.returncode == 0, first.stderr
    assert "setup: done" in first.stdout
    assert installs(checkout) == 1
    assert "--constraint constraints.txt" in (checkout / "pip-calls").read_text()
    again = setup(checkout)
    assert (again.returncode, again.stdout, installs(checkout)) == (0, "", 1)
    for name in ("constraints.txt", "pyproject.toml"):
        with open(checkout / name, "a") as file:
            file.write("# changed\n")
        setup(checkout)
    assert installs(checkout) == 3


def test_an_interrupted_setup_is_done_again(checkout):
    assert setup(checkout).returncode == 0
    python, constraints = checkout / ".venv" / "bin" / "python", checkout / "constraints.txt"
    whole, before = python.read_text(), constraints.read_text()
    python.write_text(whole.replace('if [ "$1"', 'if [ "$1 $3" = "-m install" ]; then exit 1; elif [ "$1"'))
    constraints.write_text(before + "more==1\n")
    assert setup(checkout).returncode != 0
    # Back to what was installed before the interruption, which may have left half of something else.
    python.write_text(whole)
    constraints.write_text(before)
    assert setup(checkout).returncode == 0
    assert installs(checkout) == 2


def test_setup_says_which_python_is_missing(checkout):
    (checkout / ".python-version").write_text("3.99\n")
    result = setup(checkout)
    assert result.returncode == 1
    assert result.stderr.startswith("error: there is no Python 3.99 here")
    assert installs(checkout) == 0


def test_quickstart_trains_and_prints_what_the_model_writes(checkout):
    """Its own two commands, with the flags that make them short; what it sets up is tested above."""
    for name in ("scripts/quickstart", "recipes/lm_shakespeare.py", "recipes/data/shakespeare.jsonl.gz"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "scripts" / "setup").write_text("#!/usr/bin/env bash\necho set up\n")
    command = checkout / ".venv" / "bin" / "jaxscale"
    command.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m jaxscale "$@"\n')
    command.chmod(0o755)
    small = ["--model.layers", "1", "--model.width", "32", "--model.mlp", "64", "--data.sequence", "64"]
    flags = ["--steps", "2", *small, "--evaluate.batches", "1"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAXSCALE_CACHE": str(checkout / "cache")}
    variables["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    with subprocess.Popen(
        [checkout / "scripts" / "quickstart", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env=variables,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=240)
        finally:  # the training is a child of the script
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert output.startswith("set up\nquickstart 1/2: training recipes/lm_shakespeare.py on 8 emulated devices")
    trained, _, written = output.partition('quickstart 2/2: the model goes on from "ROMEO."\n')
    assert "done: 2 steps trained and saved in runs/quickstart" in trained
    assert written.startswith("ROMEO.\n")
    assert len(written) > len("ROMEO.\n") + 20
    assert len((checkout / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()) == 2


def test_constraints_are_exact_and_name_no_place():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 30
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    required = re.findall(r'"([A-Za-z0-9-]+)[>=<]', (ROOT / "pyproject.toml").read_text().split("[project.optional")[0])
    assert {name.lower() for name in required} - {"setuptools"} <= pinned


@pytest.mark.parametrize(
    ("name", "text", "offence"),
    [
        ("jaxscale/long.py", "x = 1\n" * 401, "401 lines"),
        ("jaxscale/utils.py", "", "name the file after what is in it"),
        ("docs/page.md", "see /" + "home/jane/data\n", "docs/page.md:1"),
        ("scripts/get", "pip install --index" + "-url x\n", "scripts/get:1"),
        ("constraints.txt", "jax>=0.12\n", "is not name==version"),
        ("jaxscale/good.py", "x = 1\n" * 400, None),
        ("constraints.txt", "jax==0.12\n", None),
    ],
)
def test_rules_of_the_house(name, text, offence, tmp_path):
    spec = importlib.util.spec_from_file_location("rules", ROOT / ".ci" / "rules.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = rules.check(name, path)
    assert len(found) == (0 if offence is None else 1)
    assert offence is None or offence in found[0]
