"""A run directory with some small checkpoints, and the command line that looks at it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from states import make_mesh, make_record, make_state

from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.testing.s3_server import s3_server, variables

STEPS = (10, 20, 30, 40)
LOSSES = {10: 3.0, 20: 1.5, 30: 2.0}
"""Of their evaluations; step 40 was not evaluated."""


def make_run(run, steps=STEPS, config=None):
    """Saves the steps, each on 8 devices, as a plain run does."""
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"name": "test", "checkpoint": {"keep": 10}, **(config or {})}))
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        checkpoints = DurableCheckpoints(run / "checkpoints", every=1, keep=100)
        for step in steps:
            line = {"step": step, "epoch": 1, "loss": 1.0}
            if step in LOSSES:
                line |= {"eval_loss": LOSSES[step], "eval_tokens": 1000}
            checkpoints.offer(step, make_state(mesh, seed=step), make_record(step, metrics_line=line), final=True)
        checkpoints.close()


@pytest.fixture(scope="session", name="made")
def _made(tmp_path_factory):
    """A run that nobody changes. Copy it (`run`)."""
    made = tmp_path_factory.mktemp("kept") / "run"
    make_run(made)
    return made


@pytest.fixture(name="run")
def _run(tmp_path, made):
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="session", name="s3")
def _s3():
    """The environment of an S3 server."""
    with s3_server() as server:
        yield variables(server.address)


def checkpoints(*arguments, code=0, env=None):
    """`jaxscale checkpoints ARGUMENTS` in a process of its own; its standard output. Fails on another exit code."""
    result = subprocess.run(
        [sys.executable, "-m", "jaxscale", "checkpoints", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout if code != 2 else result.stderr


def said(*arguments, code=0):
    """The JSON that it prints."""
    return json.loads(checkpoints(*arguments, "--json", code=code))
