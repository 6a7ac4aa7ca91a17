"""Checkpoints and run directories in worlds of 2 and 4 real processes over gloo."""

import json
from pathlib import Path

import jax
from states import make_abstract, make_mesh, make_record, make_state, same_bits

from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.checkpoint.layout import numbered
from jaxscale.checkpoint.restore import restore_newest
from jaxscale.run_directory import highest_epoch
from jaxscale.testing.processes import run_world

SCRIPT = Path(__file__).parent / "world_of_checkpoints.py"


def run(action, folder, processes, devices, **axes):
    outcomes = run_world(
        [str(SCRIPT), "{distributed}", action, str(folder), json.dumps(axes)], processes, devices, timeout=120
    )
    return [json.loads(outcome.stdout.splitlines()[-1]) for outcome in outcomes]


def good(step, rejected=()):
    return {"step": step, "wrong": [], "rejected": list(rejected)}


def test_two_processes_save_and_one_and_four_restore(tmp_path):
    folder = tmp_path / "checkpoints"
    events, none = run("save", folder, 2, 2, fsdp=4)
    assert (events, none) == (["sealed"] * 3, []), "process 0 alone writes what is not arrays"
    mesh = make_mesh(tensor=2, fsdp=4)
    with jax.set_mesh(mesh):
        state, record = restore_newest(folder, make_abstract(mesh))
    assert (record, same_bits(state, seed=3)) == (make_record(3), [])
    assert run("restore", folder, 4, 1, tensor=2, fsdp=2) == [good(3)] * 4
    (folder / "3" / "record.json").write_text("{")
    assert run("restore", folder, 2, 1, data=2) == [good(2, rejected=[3])] * 2, "all fall back to the same step"


def test_one_process_saves_and_two_restore(tmp_path):
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        DurableCheckpoints(tmp_path, 1, 3).offer(4, make_state(mesh, seed=4), make_record(4), final=True)
    assert run("restore", tmp_path, 2, 2, data=2, fsdp=2) == [good(4)] * 2
    (tmp_path / "4" / "manifest.json").unlink()
    assert run("restore", tmp_path, 2, 1, fsdp=2) == ["DamagedCheckpoint"] * 2


def test_a_save_that_fails_on_one_process_fails_on_all_and_the_next_one_works(tmp_path):
    folder = tmp_path / "checkpoints"
    first, second = run("fail", folder, 2, 1, fsdp=2)
    assert first == ["alarm", "sealed"]
    assert second == ["alarm"]
    assert numbered(folder) == [2]


def test_nobody_waits_for_a_process_whose_part_failed(tmp_path):
    first, second = run("fail_late", tmp_path, 2, 1, fsdp=2)
    assert "step 3 could not be saved: the disk that holds" in first
    assert "step 3 could not be saved: RuntimeError: another process could not save its part" in second
    assert numbered(tmp_path) == [2]


def test_a_world_shares_one_run_directory(tmp_path):
    processes = 2
    folder = tmp_path / "run"
    assert run("run_directory", folder, processes, 1, data=processes) == [{"epoch": 1, "refused": True}] * processes
    assert highest_epoch(folder) == 1
    started = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert sorted((line["kind"], line["rank"]) for line in started) == [("worker_started", 0), ("worker_started", 1)]
    assert sorted(path.name.rsplit("-", 1)[1] for path in (folder / "logs").iterdir()) == []
