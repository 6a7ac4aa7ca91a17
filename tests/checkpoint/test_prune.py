"""Pruning: what goes, what stays, and what a kill or somebody who reads or trains at that moment changes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from kept_runs import STEPS, checkpoints, said
from states import make_abstract, make_mesh, same_bits

from jaxscale.checkpoint import holds, layout, prune
from jaxscale.checkpoint.place import open_place
from jaxscale.checkpoint.restore import restore, restore_params
from jaxscale.checkpoint.retention import Rules
from jaxscale.checkpoint.verify import verify_step
from jaxscale.cli import main
from jaxscale.storage.local_store import LocalStore
from jaxscale.testing.checkpoints import flip

AN_ARRAY = Path("state", "params.layers.mlp", "c", "0", "3", "0")


def steps(run):
    return layout.numbered(run / "checkpoints")


def test_a_dry_run_says_what_would_go(run):
    before = sorted(run.rglob("*"))
    found = said("prune", run, "--keep", 1, "--days", 0, "--dry-run")
    assert [one["step"] for one in found["would_delete"]] == [10, 30]
    assert {one["step"]: one["kept_because"] for one in found["kept"]} == {
        20: ["best evaluation (1.5000)"],
        40: ["newest"],
    }
    assert found["deleted"] == []
    text = checkpoints("prune", run, "--keep", 1, "--days", 0, "--dry-run")
    assert "step 30 would go" in text
    assert "step 40 stays: newest" in text
    assert "2 checkpoints would be deleted, " in text
    assert sorted(run.rglob("*")) == before
    checkpoints("prune", run, "--keep", 1, "--days", 0)
    assert steps(run) == [20, 40]
    assert all(verify_step(LocalStore(run), step) == [] for step in (20, 40))


def test_what_is_young_stays_unless_it_is_said_otherwise(run):
    assert "--days 0 keeps none for that" in checkpoints("prune", run, "--keep", 1)
    assert steps(run) == list(STEPS)
    (run / "config.json").write_text(json.dumps({"checkpoint": {"keep": 1, "milestones": 30}}))
    checkpoints("prune", run, "--days", 0)
    assert steps(run) == [20, 30, 40], "as the run's settings say"


def test_a_damaged_newest_step_is_no_reason_to_delete_the_whole_one_before(run):
    flip(run / "checkpoints" / "40" / AN_ARRAY, 5)
    found = said("prune", run, "--keep", 1, "--days", 0)
    assert found["deleted"] == [10]
    assert steps(run) == [20, 30, 40], "40 looks whole, and is not"
    assert {one["step"]: one["state"] for one in found["kept"]} == {20: "sealed", 30: "sealed", 40: "damaged"}


def test_nothing_goes_without_a_whole_step(run):
    for step in STEPS:
        flip(run / "checkpoints" / str(step) / AN_ARRAY, 5)
    assert said("prune", run, "--keep", 1, "--days", 0)["deleted"] == []
    assert steps(run) == list(STEPS)


def make_litter(run):
    """What kills leave: half a save with its mark, half a deletion, a mark alone, half a fetch."""
    folder = run / "checkpoints"
    layout.begin(folder / "50")
    (folder / "50").mkdir()
    (folder / "50" / "process-0.json").write_text("{}")
    layout.uncommit(folder / "10")
    layout.begin(folder / "60")
    (folder / "20.fetching").mkdir()
    (folder / "20.fetching" / "x").touch()
    (folder / "notes").mkdir()


def test_litter_of_crashed_saves_goes(run):
    make_litter(run)
    found = said("prune", run)
    assert sorted(found["litter"]) == ["20.fetching", "60.saving"]
    assert found["deleted"] == [10, 50]
    assert sorted(os.listdir(run / "checkpoints")) == ["20", "30", "40", "notes"], "and nothing that is nobody's litter"


@pytest.mark.parametrize("how", ["lock", "owner"])
def test_while_somebody_trains_unfinished_saves_stay(run, how):
    make_litter(run)
    before = sorted(os.listdir(run / "checkpoints"))
    with open(run / ".lock", "w") as file:
        if how == "lock":
            file.write("pid 7 on here\n")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            owner = {"run": "test", "job": "j", "generation": 1, "host": "far", "pid": 1, "process": "a b 1 2"}
            (run / "owner.json").write_text(json.dumps(owner | {"time": time.time(), "released": False, "nonce": ""}))
        assert "somebody trains there" in checkpoints("prune", run, "--keep", 9)
    assert sorted(os.listdir(run / "checkpoints")) == before
    checkpoints("prune", run, "--keep", 1, "--days", 0, "--dry-run")


def test_what_is_read_stays_until_it_was_read(run):
    with holds.holding(run / "checkpoints", 30, "a test"):
        (text,) = [line for line in checkpoints("list", run).splitlines() if line.strip().startswith("30")]
        assert f"held by a test (pid {os.getpid()})" in text
        assert said("prune", run, "--keep", 1, "--days", 0)["deleted"] == [10]
    assert said("prune", run, "--keep", 1, "--days", 0)["deleted"] == [30]
    assert not (run / "checkpoints" / holds.HOLDS).exists()


def test_what_is_read_just_now_stays(run):
    """A hold that comes between the plan and the deed."""
    made = prune.plan(open_place(str(run)), run / "checkpoints", Rules(1), is_live=False)
    assert [one.step for one in made.goes] == [10, 30]
    with holds.holding(run / "checkpoints", 30, "a test"):
        assert prune.carry_out(run / "checkpoints", [10, 30]) == [10]


def test_a_dead_readers_hold_counts_no_more(run):
    code = (
        "import os, sys, pathlib; from jaxscale.checkpoint import holds\n"
        "with holds.holding(pathlib.Path(sys.argv[1]), 30, 'one that dies'): os.kill(os.getpid(), 9)"
    )
    folder = run / "checkpoints"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -signal.SIGKILL
    assert len(list((folder / holds.HOLDS).iterdir())) == 1
    assert holds.held(folder, time.time()) == {}
    assert said("prune", run, "--keep", 1, "--days", 0)["deleted"] == [10, 30]
    assert not (folder / holds.HOLDS).exists()


def test_a_hold_of_another_host_counts_for_a_day(run):
    folder = run / "checkpoints"
    with holds.holding(folder, 30, "far"):
        (path,) = (folder / holds.HOLDS).iterdir()
        hold = json.loads(path.read_text()) | {"host": "elsewhere/12345678"}
        path.write_text(json.dumps(hold))
        assert 30 in holds.held(folder, time.time())
        assert 30 not in holds.held(folder, time.time() + holds.EXPIRES_SECONDS + 1)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": holds._host(), "started": "1"}))
        assert 30 not in holds.held(folder, time.time()), "another process has that number now"
        for junk in ("", "[]", "{}", json.dumps(hold | {"pid": -1}), json.dumps(hold | {"step": "30"})):
            path.write_text(junk)
            holds.held(folder, time.time())


def test_a_restore_holds_its_step(run, monkeypatch):
    seen = []
    check = layout.check_files

    def look(path):
        seen.append(holds.held(path.parent, time.time()))
        return check(path)

    monkeypatch.setattr(layout, "check_files", look)
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        restore(run / "checkpoints", 30, make_abstract(mesh))
        restore_params(run / "checkpoints", 20, make_abstract(mesh)["params"])
    assert [sorted(found) for found in seen] == [[30], [20]]
    assert "a start" in seen[0][30][0]
    assert holds.held(run / "checkpoints", time.time()) == {}


@pytest.mark.parametrize("arguments", [["--keep", "0"], ["--days", "-1"], ["--days", "nan"], ["--milestones", "-2"]])
def test_nonsense_is_refused(run, arguments, capsys):
    assert main(["checkpoints", "prune", str(run), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert steps(run) == list(STEPS)


def test_a_bucket_is_refused(capsys):
    import fsspec

    fsspec.filesystem("memory").pipe("/pruned/checkpoints/1/manifest.json", b"{}")
    assert main(["checkpoints", "prune", "memory://pruned"]) == 2
    assert "no run directory on this machine" in capsys.readouterr().err


KILLED = """
import os, sys, pathlib, shutil
from jaxscale.checkpoint import layout, prune
point = sys.argv[2]
def die(name):
    if name == point: os.kill(os.getpid(), 9)
unlink, rmtree = pathlib.Path.unlink, shutil.rmtree
def dying_unlink(self, missing_ok=False):
    unlink(self, missing_ok)
    die(self.name)
pathlib.Path.unlink = dying_unlink
def dying_rmtree(path, ignore_errors=False):
    die("before")
    for child in sorted(pathlib.Path(path).rglob("*"), reverse=True)[:20]:
        os.unlink(child) if child.is_file() else os.rmdir(child)
    die("half")
    rmtree(path, ignore_errors=ignore_errors)
    die("after")
shutil.rmtree = dying_rmtree
prune.carry_out(pathlib.Path(sys.argv[1]), [10, 30], lambda step: die(f"told {step}"))
"""


@pytest.mark.parametrize(
    "point", ["told 10", layout.COMMIT_FILE, layout.MANIFEST, "before", "half", "after", "10.saving", "told 30"]
)
def test_a_kill_while_it_prunes(run, point):
    """The newest step loads exactly, what is left counts as no step or as a whole one, and the next prune sweeps it."""
    folder = run / "checkpoints"
    died = subprocess.run([sys.executable, "-c", KILLED, str(folder), point], check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    for step in layout.list_steps(folder):
        assert verify_step(LocalStore(run), step) == []
    assert {one["state"] for one in said("list", run)} <= {"sealed", "partial"}
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        state, _ = restore(folder, 40, make_abstract(mesh))
    assert same_bits(state, 40) == []
    prune.carry_out(
        folder, [one.step for one in prune.plan(open_place(str(run)), folder, Rules(1), is_live=False).goes]
    )
    prune.sweep_litter(folder, layout.litter(folder))
    assert sorted(os.listdir(folder)) == ["20", "40"]


def test_training_keeps_what_the_settings_say(run):
    folder = run / "checkpoints"
    assert prune.expire(folder, Rules(2), 40) == [10], "20 is the best evaluation"
    assert prune.expire(folder, Rules(1, milestones=30), 40) == []
    assert steps(run) == [20, 30, 40]


def test_a_disk_that_is_nearly_full_keeps_fewer(run, monkeypatch, caplog):
    usage = prune.shutil.disk_usage(run)
    monkeypatch.setattr(prune.shutil, "disk_usage", lambda _: usage._replace(free=0))
    (run / "checkpoints" / "20" / "record.json").unlink()
    assert prune.expire(run / "checkpoints", Rules(10), 40) == [10, 20]
    assert "0.0 GB left" in caplog.text
