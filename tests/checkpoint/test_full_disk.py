"""A disk that is really full: a tiny file system in memory. Needs the right to mount; skipped, and said, without it."""

import contextlib
import logging
import os
import subprocess

import jax
import pytest
from states import make_abstract, make_mesh, make_record, make_state, same_bits

from jaxscale.checkpoint.durable import DurableCheckpoints, SaveFailed
from jaxscale.checkpoint.restore import list_steps, restore_newest
from jaxscale.config import Config, DataConfig, RunConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.run_directory import open_run
from jaxscale.track.jsonl import CannotWrite, JsonlMetrics, read_metrics


@pytest.fixture(name="disk")
def _disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a tiny file system is not allowed here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(
            ["umount", "--lazy", path], check=True
        )  # lazy: a thread of a failed save may still have a file open


def fill(disk, leave):
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


def test_a_checkpoint_on_a_full_disk_is_reported_and_the_older_one_stays(disk, caplog):
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh), caplog.at_level(logging.ERROR, logger="jaxscale"):
        checkpoints = DurableCheckpoints(disk / "checkpoints", 1, 3)
        checkpoints.offer(1, make_state(mesh, seed=1), make_record(1), final=True)
        fill(disk, leave=8192)
        checkpoints.offer(2, make_state(mesh, seed=2), make_record(2))
        with pytest.raises(SaveFailed, match=r"after step 2 could not be saved: the disk that holds .* is full"):
            checkpoints.close()
        assert "step 2 could not be saved, training goes on: the disk that holds" in caplog.text
        state, record = restore_newest(disk / "checkpoints", make_abstract(mesh))
        assert (record.step, same_bits(state, seed=1)) == (1, [])
        (disk / "ballast").unlink()
        checkpoints.offer(3, make_state(mesh, seed=3), make_record(3), final=True)
        assert list_steps(disk / "checkpoints") == [1, 3]


def test_metrics_on_a_full_disk_are_a_clear_error_and_no_torn_line(disk):
    metrics = JsonlMetrics(disk / "metrics.jsonl")
    metrics.write({"step": 1, "epoch": 1, "loss": 0.5})
    fill(disk, leave=0)
    with pytest.raises(CannotWrite, match=r"cannot write .*metrics.jsonl: the disk is full; make room"):
        metrics.write({"step": 2, "epoch": 1, "loss": "x" * 8192})
    assert (disk / "metrics.jsonl").read_bytes().endswith(b"\n")
    (disk / "ballast").unlink()
    metrics.write({"step": 1000, "epoch": 1, "loss": 0.25})
    metrics.commit()
    metrics.close()
    assert read_metrics(disk / "metrics.jsonl")[-1]["loss"] == 0.25


def test_a_job_that_starts_again_on_a_full_disk_has_its_run_directory(disk, monkeypatch):
    """A coordinator that takes over, or comes back: the run it looks after may train on for hours without storage."""
    model = TransformerConfig(vocabulary=8, layers=1, width=8, heads=1, mlp=8)
    config = Config(name="full", model=model, steps=1, data=DataConfig(path="x"), run=RunConfig(dir=str(disk / "run")))
    first = open_run(config, job="one")
    first.begin({})
    first.close()
    fill(disk, leave=0)
    truncate = os.ftruncate

    def truncate_and_lose_it(file, length):
        truncate(file, length)
        with contextlib.suppress(OSError), open(disk / "ballast", "ab", buffering=0) as ballast:
            while True:  # a worker's log is quicker
                ballast.write(bytes(4096))

    monkeypatch.setattr(os, "ftruncate", truncate_and_lose_it)
    again = open_run(config, job="one")
    assert (disk / "run" / ".lock").read_text().startswith("job one: pid ")
    again.close()
