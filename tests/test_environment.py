"""environment.json: what it says, what it must not say, and its differences."""

import json
import platform
import socket
import subprocess

import jax

from jaxscale import environment as library
from jaxscale.environment import diff, environment, flags, git


def repository(path):
    def run(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=test", "-c", "user.email=test@example.com", *arguments],
            cwd=path,
            check=True,
            capture_output=True,
        )

    run("init", "-q")
    (path / "recipe.py").write_text("a = 1\n")
    run("add", ".")
    run("commit", "-q", "-m", "first")
    return run


def test_it_says_what_matters_and_nothing_private(tmp_path, monkeypatch):
    repository(tmp_path)
    found = environment(tmp_path)
    assert found["packages"]["jax"] == jax.__version__
    assert found["devices"] == {"kinds": {"cpu": 8}, "count": 8, "processes": 1}
    assert len(found["git"]["commit"]) == 40
    text = json.dumps(found)
    assert "/" not in text
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    assert "secret-host" not in json.dumps(environment(tmp_path))


def test_flags_without_paths_and_addresses():
    assert flags(
        {
            "XLA_FLAGS": "--xla_a=true --xla_dump_to=/home/someone/dump --xla_b=3",
            "LIBTPU_INIT_ARGS": "--x=1",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": "/home/someone/cache",
            "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1",
            "TPU_WORKER_HOSTNAMES": "secret",
            "NCCL_DEBUG_FILE": "x",
            "NCCL_ALGO": "Ring",
            "JAX_ODD": "/etc",
            "HOME": "/home/someone",
            "WANDB_API_KEY": "secret",
        }
    ) == {
        "JAX_ODD": "(path)",
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": "--x=1",
        "NCCL_ALGO": "Ring",
        "XLA_FLAGS": "--xla_a=true --xla_dump_to=(path) --xla_b=3",
    }


def test_the_digest_changes_with_what_is_not_committed(tmp_path):
    assert git(tmp_path) == {}
    run = repository(tmp_path)
    clean = git(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["uncommitted"] == ""
    digests = {""}
    for name, text in [
        ("recipe.py", "a = 2\n"),
        ("recipe.py", "a = 3\n"),
        ("new.py", "b = 1\n"),
        ("new.py", "b = 2\n"),
    ]:
        (tmp_path / name).write_text(text)
        digests.add(git(tmp_path)["uncommitted"])
    assert len(digests) == 5
    before = git(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("a run's own output is no change of the program")
    assert git(tmp_path) == before
    (tmp_path / "inner").mkdir()
    assert git(tmp_path / "inner") == before, "the same from anywhere in the repository"
    run("add", ".")
    run("commit", "-q", "-m", "second")
    assert git(tmp_path)["uncommitted"] == ""


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    repository(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert git(tmp_path) == {}


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(library, "PACKAGES", ("jax", "no-such-package"))
    assert list(library.packages()) == ["jax"]


def test_differences():
    old = {"packages": {"jax": "1", "numpy": "2"}, "git": {"commit": "a"}}
    new = {"packages": {"jax": "2", "numpy": "2"}, "git": {}}
    assert diff(old, new) == ['git.commit: "a" -> "(absent)"', 'packages.jax: "1" -> "2"']
    assert diff(old, old) == []
