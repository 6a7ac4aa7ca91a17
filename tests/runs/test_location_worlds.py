"""Worlds of several processes with a further location: process 0 copies and fetches, and all of them end alike."""

import json
import shutil

import pytest
from small_runs import NANO, SMALL, environment, losses, train

from jaxscale.checkpoint.layout import list_steps, read_manifest
from jaxscale.testing.processes import PLACE, run_world
from jaxscale.track.jsonl import read_metrics
from jaxscale.train.protocols import ExitReason

STEPS = 8
FLAGS = ("--steps", STEPS, "--optim.learning-rate", "0.01", "--devices", 2, "--checkpoint.every", 3)
pytestmark = pytest.mark.slow


def run_two(folder, *flags, check=True):
    """Two processes of one device each; `flags` come last."""
    command = [NANO, *SMALL, "--run.dir", str(folder), *map(str, (*FLAGS, *flags)), "--distributed", PLACE]
    return run_world(command, 2, environment=environment(), check=check)


def events(folder, kind):
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(step):
    """Flips a bit of an array in a step's folder."""
    shards = read_manifest(step).shards.values()
    path = step / max((shard for found in shards for shard in found), key=lambda shard: shard.nbytes).file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module", name="done")
def _done(tmp_path_factory):
    """`run` of two processes, with its copies in `far`. Copy both."""
    folder = tmp_path_factory.mktemp("two")
    run_two(folder / "run", "--checkpoint.locations", folder / "far")
    return folder


def copied(done, folder):
    for name in ("run", "far"):
        shutil.copytree(done / name, folder / name)
    return folder / "run", folder / "far"


def test_the_copies_of_two_processes_are_whole_and_one_process_goes_on_from_them(tmp_path, done):
    run, far = copied(done, tmp_path)
    steps = list_steps(far / "checkpoints")
    assert steps[-1] == STEPS
    for step in steps:
        if step in list_steps(run / "checkpoints"):
            assert files(far / "checkpoints" / str(step)) == files(run / "checkpoints" / str(step))
    shutil.rmtree(run)
    for step in steps[1:]:
        shutil.rmtree(far / "checkpoints" / str(step))
    assert train(run, *FLAGS, "--checkpoint.locations", far) is ExitReason.COMPLETED
    (fetched,) = events(run, "fetched")
    assert fetched["step"] == steps[0] < STEPS
    again = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["step"] > steps[0]]
    assert again == pytest.approx(losses(done / "run")[steps[0] :], abs=1e-5)
    assert list_steps(far / "checkpoints")[-1] == STEPS


def test_two_processes_fetch_what_is_sound_and_report_what_is_not(tmp_path, done):
    run, far = copied(done, tmp_path)
    newest, older = list_steps(far / "checkpoints")[-1], list_steps(far / "checkpoints")[-2]
    shutil.rmtree(run)
    damage(far / "checkpoints" / str(newest))
    run_two(run, "--checkpoint.locations", far)
    assert [event["step"] for event in events(run, "fetched")] == [older]
    (rejected,) = events(run, "rejected")
    assert (rejected["step"], rejected["location"]) == (newest, str(far))
    assert losses(done / "run")[older:] == [x["loss"] for x in read_metrics(run / "metrics.jsonl") if x["step"] > older]
    assert files(far / "checkpoints" / str(newest)) == files(run / "checkpoints" / str(newest)), (
        "replaced by a sound one"
    )


def test_two_processes_replace_a_damaged_step_by_its_copy(tmp_path, done):
    run, far = copied(done, tmp_path)
    damage(run / "checkpoints" / str(STEPS))
    run_two(run, "--checkpoint.locations", far, "--steps", STEPS + 2)
    assert [event["step"] for event in events(run, "rejected")] == [STEPS]
    assert [event["step"] for event in events(run, "fetched")] == [STEPS]
    assert len(losses(run)) == STEPS + 2
    assert list_steps(far / "checkpoints")[-1] == STEPS + 2


@pytest.mark.parametrize("what", ["silent", "owned", "damaged"])
def test_what_process_0_refuses_all_refuse_and_nothing_is_left(tmp_path, done, what):
    run, far = copied(done, tmp_path)
    shutil.rmtree(run)
    if what == "silent":
        shutil.rmtree(far)
        far.write_text("a file where a folder belongs")
    if what == "owned":
        record = json.loads((far / "owner.json").read_bytes())
        (far / "owner.json").write_text(json.dumps({**record, "run": "another recipe"}))
    if what == "damaged":
        for step in list_steps(far / "checkpoints"):
            damage(far / "checkpoints" / str(step))
    outcomes = run_two(run, "--checkpoint.locations", far, check=False)
    words = {"silent": "cannot be found out", "owned": "is of another recipe", "damaged": "can be read"}[what]
    assert words in outcomes[0].stderr
    assert "Traceback" not in outcomes[0].stderr
    assert not any(outcome.killed for outcome in outcomes), "nobody waits for the other"
    codes = {outcome.exit_code for outcome in outcomes}
    assert codes == ({1} if what == "damaged" else {2})
    assert not (run / "metrics.jsonl").exists()
