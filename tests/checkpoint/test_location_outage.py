"""A location that fails for a while: known within 5 s, left behind, caught up with, without help."""

import errno
import json
import threading
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxscale.checkpoint import layout, location, owner, step_copy, versions
from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.checkpoint.locations import CopyFailed, Locations
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.checkpoint.owner import OWNER, OwnershipLost
from jaxscale.checkpoint.versions import Version
from jaxscale.retry import RetryConfig
from jaxscale.storage.guarded import Bounds
from jaxscale.storage.local_store import LocalStore
from jaxscale.train.protocols import Record

ALARM_SECONDS = 5.0


def save(run, step):
    checkpoints = DurableCheckpoints(run / "checkpoints", 1, 3)
    record = Record(step=step, row=step, metrics_line={}, config={"steps": 9}, data={}, environment={})
    checkpoints.offer(step, {"params": {"w": jnp.arange(64.0) + step}}, record, final=True)
    checkpoints.close()


@pytest.fixture(name="run")
def _run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"name": "lm"}))
    save(run, 1)
    return run


def locations_at(run, *addresses, heard=None, lost=lambda _: None):
    checkpoint = SimpleNamespace(locations=tuple(map(str, addresses)), keep=2, milestones=0, alarm_after=900.0)
    config = SimpleNamespace(name="lm", checkpoint=checkpoint)
    told = [] if heard is None else heard
    made = Locations(run, config, "job", lambda kind, **fields: told.append((time.monotonic(), kind, fields)), lost)
    made.look()
    made.take()
    made.begin(set())
    return made


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_outage_is_known_within_5_s_and_over_without_help(run, tmp_path, monkeypatch, number):
    heard, broken = [], []
    write = LocalStore._write

    def failing(store, name, chunks, **options):
        if broken and "far" in store.address:
            raise OSError(number, "no")
        return write(store, name, chunks, **options)

    monkeypatch.setattr(LocalStore, "_write", failing)
    monkeypatch.setattr(location, "COPY_RETRY", RetryConfig(open_seconds=1.0))
    made = locations_at(run, tmp_path / "far", heard=heard)
    made.wait(20)
    broken.append(1)
    began = time.monotonic()
    save(run, 2)

    def alarms(what):
        return [at for at, kind, fields in heard if kind == "alarm" and fields["what"] == what]

    until(lambda: alarms("location failing"))
    assert alarms("location failing")[0] - began < ALARM_SECONDS
    with pytest.raises(CopyFailed, match="step 2 is safe in"):
        made.wait(0)
    assert json.loads((run / "locations.json").read_text())[0]["reason"]
    broken.clear()
    until(lambda: alarms("location back"), 60)
    made.wait(60)
    made.close()
    assert layout.list_steps(tmp_path / "far" / "checkpoints") == [1, 2]
    assert json.loads((run / "locations.json").read_text())[0]["step"] == 2


def test_a_copy_is_fetched_whole_or_not_at_all(run, tmp_path):
    store = LocalStore(tmp_path / "far")
    step_copy.StepCopy(store, run / "checkpoints" / "1").run(lambda: None)
    step_copy.fetch_step(store, 1, tmp_path / "back")
    layout.check_files(tmp_path / "back" / "1")
    manifest = layout.read_manifest(tmp_path / "back" / "1")
    victim = next(shard.file for shards in manifest.shards.values() for shard in shards)
    path = tmp_path / "far" / "checkpoints" / "1" / victim
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="digest"):
        step_copy.fetch_step(store, 1, tmp_path / "other")
    assert layout.numbered(tmp_path / "other") == []


def test_a_copy_without_the_right_to_commit_is_no_step(run, tmp_path):
    store = LocalStore(tmp_path / "far")

    def refused():
        raise OwnershipLost("gone")

    with pytest.raises(OwnershipLost):
        step_copy.StepCopy(store, run / "checkpoints" / "1").run(refused)
    assert step_copy.steps_at(store) == []


def test_whoever_loses_a_location_is_told_and_may_commit_nothing(run, tmp_path):
    told = []
    made = locations_at(run, tmp_path / "far", lost=told.append)
    made.wait(20)
    record = json.loads((tmp_path / "far" / OWNER).read_bytes())
    LocalStore(tmp_path / "far").write(OWNER, json.dumps({**record, "job": "other", "generation": 7}).encode())
    until(lambda: told, 2 * location.BEAT_SECONDS + 3)
    with pytest.raises(OwnershipLost, match="job other, generation 7"):
        made.check()
    made.close()
    assert json.loads((tmp_path / "far" / OWNER).read_bytes())["job"] == "other"


def test_an_old_owner_touches_nothing_of_the_new_ones_copy(run, tmp_path, monkeypatch):
    """It was cut off before it had copied a step of this number; the new owner has copied its own one by now."""
    store = LocalStore(tmp_path / "far")
    monkeypatch.setattr(location, "BEAT_SECONDS", 1e6)  # nothing but the copy itself can find out
    monkeypatch.setattr(owner, "SURE_SECONDS", 0.0)
    told = []
    made = locations_at(run, tmp_path / "far", lost=told.append)
    made.wait(20)
    other = tmp_path / "other"
    save(other, 2)
    step_copy.StepCopy(store, other / "checkpoints" / "2").run(lambda: None)
    before = store.files("checkpoints/2")
    record = json.loads((tmp_path / "far" / OWNER).read_bytes())
    store.write(OWNER, json.dumps({**record, "job": "other", "generation": 7}).encode())
    save(run, 2)
    made.sealed()
    until(lambda: told)
    made.close()
    assert store.files("checkpoints/2") == before
    assert step_copy.is_same(store, other / "checkpoints" / "2", 2)


def test_an_owner_that_is_cut_off_in_a_copy_writes_over_nothing_when_it_comes_back(run, tmp_path):
    store, asked = LocalStore(tmp_path / "far"), []

    def touch():
        asked.append(1)
        if len(asked) == 3:
            raise OwnershipLost("gone")

    with pytest.raises(OwnershipLost):
        step_copy.StepCopy(store, run / "checkpoints" / "1").run(lambda: None, touch)
    assert len(store.files("checkpoints/1")) == 1, "no file after the one that was allowed"


def test_a_copy_that_outlives_the_run_commits_nothing(run, tmp_path, monkeypatch):
    """The run ends by an error while a place is slow: it was given back, and belongs to whoever comes next."""
    began, go, told = threading.Event(), threading.Event(), []
    write = LocalStore.write_chunks

    def slow(store, name, chunks, size):
        if "far" in store.address:
            began.set()
            assert go.wait(30)
        write(store, name, chunks, size)

    monkeypatch.setattr(LocalStore, "write_chunks", slow)
    monkeypatch.setattr(location, "BEAT_BOUNDS", Bounds(attempt_seconds=0.2, call_seconds=0.2))
    made = locations_at(run, tmp_path / "far", lost=told.append)
    assert began.wait(20)
    made.close()
    copying = [thread for thread in threading.enumerate() if thread.name.startswith("_copy_all")]
    go.set()
    for thread in copying:
        thread.join(20)
    assert step_copy.steps_at(LocalStore(tmp_path / "far")) == []
    assert json.loads((tmp_path / "far" / OWNER).read_bytes())["released"]
    assert told == []


def test_a_location_keeps_versions_and_the_newest(run, tmp_path):
    versions.tag(run / "checkpoints", Version("v", 1, "digest", 0.0))
    made = locations_at(run, tmp_path / "far")
    for step in (2, 3, 4):
        made.wait(20)
        save(run, step)
        made.sealed()
    made.wait(20)
    made.close()
    assert step_copy.steps_at(LocalStore(tmp_path / "far")) == [1, 3, 4]
    assert layout.list_steps(run / "checkpoints") == [1, 2, 3, 4], "3 are kept here, and what has a name"
