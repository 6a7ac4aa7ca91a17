"""Scrubbing: what has rotted is found at a bounded rate, and mended from wherever a whole copy is."""

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys

import jax
import pytest
from kept_runs import checkpoints, said
from states import make_mesh, make_record, make_state

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.checkpoint.scrub import Pace, manifest_of, scrub_step
from jaxscale.checkpoint.step_copy import StepCopy
from jaxscale.checkpoint.verify import verify_step
from jaxscale.cli import main
from jaxscale.storage.addresses import open_store
from jaxscale.storage.local_store import LocalStore
from jaxscale.testing.checkpoints import flip

ARRAY = "state/params.layers.mlp/c/0/3/0"


@pytest.fixture(name="far")
def _far(run, tmp_path):
    """A further location of the run, with copies of steps 20 and 30."""
    far = tmp_path / "far"
    for step in (20, 30):
        StepCopy(LocalStore(far), run / "checkpoints" / str(step)).run(lambda: None)
    config = {"name": "test", "checkpoint": {"keep": 10, "locations": [str(far)]}}
    (run / "config.json").write_text(json.dumps(config))
    return far


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ruin(path, how):
    match how:
        case "flip":
            flip(path, 3) if path.stat().st_size else path.write_bytes(b"x")
        case "cut":
            path.write_bytes(path.read_bytes()[:-1] or b"xx")
        case "empty":
            path.write_bytes(b"" if path.stat().st_size else b"x")
        case "gone":
            path.unlink()


def test_what_is_whole_is_left_alone(run, far):
    before = contents(run)
    found = said("scrub", run, "--rate", 0)
    assert [(one["step"], one["location"], one["state"]) for one in found["scrubbed"]] == [
        (10, str(run), "sealed"),
        (20, str(run), "sealed"),
        (20, str(far), "sealed"),
        (30, str(run), "sealed"),
        (30, str(far), "sealed"),
        (40, str(run), "sealed"),
    ]
    assert contents(run) == before


def test_damage_is_mended_from_the_copy_and_the_copy_from_the_run(run, far):
    whole = contents(run / "checkpoints" / "20")
    flip(run / "checkpoints" / "20" / ARRAY, 9)
    (run / "checkpoints" / "20" / "manifest.json").unlink()
    flip(far / "checkpoints" / "30" / ARRAY, 9)
    text = checkpoints("scrub", run, "--dry-run", code=1)
    assert f"step 20 at {run}: DAMAGED STILL" in text
    assert verify_step(LocalStore(run), 20) != []
    text = checkpoints("scrub", run)
    assert f"step 20 at {run}: mended from {far}" in text
    assert f"step 30 at {far}: mended from {run}" in text
    assert contents(run / "checkpoints" / "20") == whole == contents(far / "checkpoints" / "20")
    assert contents(far / "checkpoints" / "30") == contents(run / "checkpoints" / "30")
    checkpoints("verify", run)
    checkpoints("verify", far)


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_that_is_not_at_both_places_is_mended(run, far, seed):
    random_ = random.Random(seed)
    here, there = (place / "checkpoints" / "30" for place in (run, far))
    whole = contents(here)
    ruined = {here: set(), there: set()}
    for name in random_.sample(sorted(whole), random_.randint(1, len(whole))):
        place, how = random_.choice([here, here, there]), random_.choice(["flip", "cut", "empty", "gone"])
        ruin(place / name, how)
        ruined[place].add(str(name))
    stores = LocalStore(run), LocalStore(far)
    can_help = (there / layout.COMMIT_FILE).exists() and manifest_of(stores[1], 30) is not None
    result = scrub_step(stores[0], 30, [stores[1]], Pace(0))
    found = {one.file for one in result.damage}
    assert found == ruined[here] or found == {layout.MANIFEST} <= ruined[here]
    if ruined[here] and not can_help:
        assert result.left
        assert verify_step(stores[0], 30) != []
    else:
        assert not result.left
        assert contents(here) == whole
        assert not scrub_step(stores[1], 30, [stores[0]], Pace(0)).left
        assert contents(there) == whole


def test_what_both_have_lost_is_damaged_still(run, far):
    for place in (run, far):
        flip(place / "checkpoints" / "30" / ARRAY, 9)
    flip(run / "checkpoints" / "30" / "record.json", 9)
    found = {(one["step"], one["location"]): one for one in said("scrub", run, code=1)["scrubbed"]}
    assert found[30, str(run)]["state"] == found[30, str(far)]["state"] == "damaged"
    assert f"{ARRAY} is damaged too" in found[30, str(run)]["reason"]
    assert "mended_from" in found[20, str(run)]


@pytest.mark.usefixtures("far")
def test_a_copy_of_another_save_mends_nothing(run):
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        again = DurableCheckpoints(run / "checkpoints", every=1, keep=9)
        again.offer(30, make_state(mesh, seed=99), make_record(30), final=True)
        again.close()
    flip(run / "checkpoints" / "30" / ARRAY, 9)
    kept = contents(run / "checkpoints" / "30")
    assert "has step 30 of another save" in checkpoints("scrub", run, "--step", 30, code=1)
    assert contents(run / "checkpoints" / "30") == kept


def test_the_second_place_is_asked_when_the_first_cannot_help(run, far, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(far, second)
    flip(far / "checkpoints" / "30" / ARRAY, 9)
    flip(run / "checkpoints" / "30" / ARRAY, 1)
    result = scrub_step(LocalStore(run), 30, [LocalStore(far), LocalStore(second)], Pace(0))
    assert result.mended_from == str(second)


def test_a_place_that_does_not_answer_is_told(run, far):
    config = {"checkpoint": {"locations": [str(far), "nowhere://at/all"]}}
    (run / "config.json").write_text(json.dumps(config))
    flip(run / "checkpoints" / "30" / ARRAY, 1)
    assert f"mended from {far}" in checkpoints("scrub", run, code=1), "and the exit code says that not all was done"


def test_the_pace():
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(100.0, lambda: now[0], sleep)
    for _ in range(20):
        now[0] += 0.1  # reading takes time too
        pace(50)
    assert now[0] == pytest.approx(20 * 50 / 100)
    now[0] += 1000
    before = now[0]
    for _ in range(10):
        pace(50)
    assert now[0] - before == pytest.approx(10 * 50 / 100 - 1), "an idle hour is not made up at once"
    Pace(0, lambda: 0.0, lambda _: pytest.fail("no bound"))(1 << 40)


def test_reading_is_held_to_the_rate(run, monkeypatch):
    read = []
    monkeypatch.setattr(Pace, "__call__", lambda _, nbytes: read.append(nbytes))
    assert main(["checkpoints", "scrub", str(run), "--step", "30"]) == 0
    assert sum(read) == sum(entry.nbytes for entry in layout.read_manifest(run / "checkpoints" / "30").files.values())


KILLED = """
import os, sys
from pathlib import Path
from jaxscale.checkpoint.scrub import Pace, mend_step
from jaxscale.storage.local_store import LocalStore
left = [int(sys.argv[3])]
replace = os.replace
def dying(a, b):
    left[0] -= 1
    if left[0] == 0: os.kill(os.getpid(), 9)
    replace(a, b)
os.replace = dying
mend_step(LocalStore(Path(sys.argv[1])), LocalStore(Path(sys.argv[2])), 30)
"""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_kill_while_it_mends(run, far, after):
    here = run / "checkpoints" / "30"
    whole = contents(here)
    flip(here / ARRAY, 9)
    (here / "record.json").unlink()
    (here / layout.COMMIT_FILE).unlink()
    (here / layout.MANIFEST).write_text("junk")
    died = subprocess.run([sys.executable, "-c", KILLED, str(run), str(far), str(after)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert not (here / layout.COMMIT_FILE).exists(), "no step before all else is right"
    assert verify_step(LocalStore(run), 30) != []
    assert not scrub_step(LocalStore(run), 30, [LocalStore(far)], Pace(0)).left
    left = {name: data for name, data in contents(here).items() if not name.name.endswith(".partial")}
    assert left == whole


def test_a_bucket_mends_a_run_and_is_mended(run, s3, monkeypatch):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    import botocore.session

    bucket = f"b{secrets.token_hex(6)}"
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=bucket)
    address = f"s3://{bucket}/mine"
    store = open_store(address)
    for step in (20, 30):
        StepCopy(store, run / "checkpoints" / str(step)).run(lambda: None)
    (run / "config.json").write_text(json.dumps({"checkpoint": {"locations": [address]}}))
    flip(run / "checkpoints" / "20" / ARRAY, 9)
    name = f"checkpoints/30/{ARRAY}"
    store.write(name, store.read(name)[:-1])
    found = {(one["step"], one["location"]): one for one in said("scrub", run)["scrubbed"]}
    assert found[20, str(run)]["mended_from"] == address
    assert found[30, address]["mended_from"] == str(run)
    checkpoints("verify", run)
    checkpoints("verify", address)


def test_bad_input(run, capsys):
    assert main(["checkpoints", "scrub", str(run), "--rate", "-1"]) == 2
    assert main(["checkpoints", "scrub", str(run), "--step", "31"]) == 2
    assert os.listdir(run) != []
    assert main(["checkpoints", "scrub", "--help"]) == 0
    assert "--rate 50" in capsys.readouterr().out
