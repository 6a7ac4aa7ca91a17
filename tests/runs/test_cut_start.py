"""A start that was cut short, by a kill or a full disk, wherever that was: the same command trains afterwards."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import NANO, SMALL, command, config_of, last_line, losses, run, train

from jaxscale.run_directory import open_run
from jaxscale.train.protocols import ExitReason

FLAGS = ("--steps", 1, "--devices", 1)


def content(folder):
    """What there is, without what differs in each run."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module", name="copies")
def _copies(tmp_path_factory):
    """The run directory as it is before each change of it up to the first step, in order. Read only."""
    folder = tmp_path_factory.mktemp("start")
    script = Path(__file__).with_name("copies_of_a_start.py")
    arguments = [sys.executable, script, folder / "copies", folder / "run", NANO, *SMALL, *FLAGS]
    result = run([str(argument) for argument in arguments])
    assert result.returncode == 0, result.stderr
    return sorted((folder / "copies").iterdir(), key=lambda path: int(path.name))


def test_the_copies_are_those_of_a_start(copies):
    seen = [set(content(copy)) for copy in copies]
    first = next(i for i, names in enumerate(seen) if "config.json" in names)
    assert 2 <= first < len(seen) - 3
    assert all(
        names <= {".lock", "config.json.partial"} or any(n.startswith("logs/") for n in names) for names in seen[:first]
    )
    assert "config.json.partial" in seen[first - 1]
    assert {"config.json", "environment.json", "events.jsonl", "metrics.jsonl"} <= seen[-1]
    assert not any("metrics.jsonl" in names for names in seen[:first]), "config.json comes before any other trace"


def test_every_moment_of_a_start_can_be_started_from(copies, tmp_path):
    for copy in copies:
        folder = shutil.copytree(copy, tmp_path / copy.name)
        opened = open_run(config_of(*FLAGS, "--run.dir", folder))
        assert opened.is_new == (not (copy / "config.json").exists())
        opened.close()
        assert folder.exists() == (copy / "config.json").exists(), "a new run that never began leaves nothing"


def test_and_trained_from(copies, tmp_path):
    whole = None
    different = {tuple(content(copy).items()): copy for copy in copies}
    for copy in list(different.values())[:: max(1, len(different) // 5)]:
        folder = shutil.copytree(copy, tmp_path / copy.name)
        assert train(folder, *FLAGS) is ExitReason.COMPLETED
        whole = whole or losses(folder)
        assert losses(folder) == whole
        assert len(whole) == 1
        assert not list(folder.glob("*.partial"))


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


def fill(disk, pages):
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - 4096 * pages))


@pytest.mark.parametrize("pages", range(7))
def test_a_disk_with_a_few_free_pages(disk, pages):
    """Whatever it has room for, the error is one line, and once there is room the same command trains."""
    folder = disk / "run"
    fill(disk, pages)
    result = run(command(folder, *FLAGS))
    assert result.returncode in (1, 2)
    assert last_line(result).startswith("error: ")
    assert "No space left" in result.stderr or "is full" in result.stderr
    assert folder.exists() == (folder / "config.json").exists(), "all, or nothing"
    assert not list(disk.rglob("*.partial"))
    if folder.exists():
        json.loads((folder / "config.json").read_text())
    (disk / "ballast").unlink()
    result = run(command(folder, *FLAGS))
    assert result.returncode == 0, result.stderr
    assert len(losses(folder)) == 1
