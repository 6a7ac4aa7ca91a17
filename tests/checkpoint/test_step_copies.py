"""One step at another place: what is damaged is not spread, what is cut short is no step, what is old goes."""

import json
import shutil
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import jax.numpy as jnp
import pytest

from jaxscale.checkpoint import layout, step_copy
from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.checkpoint.layout import COMMIT_FILE, MANIFEST
from jaxscale.checkpoint.locations import Locations, LocationsUnknown
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.storage.local_store import LocalStore
from jaxscale.train.protocols import Record


def save(run, *steps):
    checkpoints = DurableCheckpoints(run / "checkpoints", 1, 9)
    for step in steps:
        record = Record(step=step, row=step, metrics_line={}, config={"steps": 9}, data={}, environment={})
        checkpoints.offer(step, {"params": {"w": jnp.arange(64.0) + step}}, record, final=True)
    checkpoints.close()


def damage(step):
    """Flips a bit of an array of a step."""
    (shard,) = layout.read_manifest(step).shards["params/w"]
    data = bytearray((step / shard.file).read_bytes())
    data[shard.offset] ^= 1
    (step / shard.file).write_bytes(data)


@pytest.fixture(name="run")
def _run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"name": "lm"}))
    return run


def locations_of(run, *addresses, keep=2, event=lambda *_, **__: None):
    checkpoint = SimpleNamespace(locations=tuple(map(str, addresses)), keep=keep, milestones=0, alarm_after=900.0)
    return Locations(run, SimpleNamespace(name="lm", checkpoint=checkpoint), "job", event)


def begun(run, *addresses, **options):
    made = locations_of(run, *addresses, **options)
    made.look()
    made.take()
    made.begin(set())
    return made


def save_partly_frozen(run, *steps):
    """An array that stays as it is, and one that does not."""
    checkpoints = DurableCheckpoints(run / "checkpoints", 1, 9)
    for step in steps:
        record = Record(step=step, row=step, metrics_line={}, config={"steps": 9}, data={}, environment={})
        state = {"params": {"base": jnp.arange(64.0), "w": jnp.arange(64.0) + step}}
        checkpoints.offer(step, state, record, final=True)
    checkpoints.close()


class Watched(LocalStore):
    """Knows which files were sent."""

    sent: ClassVar[list[str]] = []

    def write_chunks(self, name, chunks, size):
        self.sent.append(name)
        super().write_chunks(name, chunks, size)


def test_what_the_step_before_has_there_is_not_sent_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Watched, "sent", [])
    store = Watched(tmp_path / "far")
    save_partly_frozen(run, 1, 2, 3)
    step_copy.StepCopy(store, run / "checkpoints" / "1").run(lambda: None)
    everything = len(Watched.sent)
    assert any("params.base" in name for name in Watched.sent)
    for step, before in ((2, 1), (3, 2)):
        Watched.sent.clear()
        step_copy.StepCopy(store, run / "checkpoints" / str(step), before).run(lambda: None)
        assert not any("params.base/c" in name for name in Watched.sent)
        assert any("params.w/c" in name for name in Watched.sent)
        assert len(Watched.sent) < everything
    step_copy.delete_step(store, 1)
    step_copy.delete_step(store, 2)
    shutil.rmtree(run / "checkpoints")
    step_copy.fetch_step(store, 3, run / "checkpoints")
    assert layout.check_files(run / "checkpoints" / "3")


def test_where_the_step_before_is_gone_or_damaged_everything_is_sent(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Watched, "sent", [])
    store = Watched(tmp_path / "far")
    save_partly_frozen(run, 1, 2)
    step_copy.StepCopy(store, run / "checkpoints" / "1").run(lambda: None)
    everything = len(Watched.sent)
    (tmp_path / "far/checkpoints/1" / MANIFEST).write_text("{")
    for before in (1, 7):
        Watched.sent.clear()
        step_copy.StepCopy(store, run / "checkpoints" / "2", before).run(lambda: None)
        assert len(Watched.sent) == everything


def test_a_damaged_step_is_not_spread_and_the_next_one_is(run, tmp_path):
    heard, store = [], LocalStore(tmp_path / "far")
    save(run, 1, 2)
    damage(run / "checkpoints" / "2")
    with pytest.raises(DamagedCheckpoint, match="digest"):
        step_copy.StepCopy(store, run / "checkpoints" / "2").run(lambda: None)
    assert step_copy.steps_at(store) == []
    made = begun(run, tmp_path / "far", event=lambda kind, **fields: heard.append((kind, fields)))
    made.wait(20)
    assert step_copy.steps_at(store) == []
    assert [fields["step"] for kind, fields in heard if kind == "rejected"] == [2]
    assert [fields["what"] for kind, fields in heard if kind == "alarm"] == ["damaged checkpoint"]
    save(run, 3)
    made.sealed()
    made.wait(20)
    made.close()
    assert step_copy.steps_at(store) == [3]


def test_the_newest_are_kept_at_a_place_and_halves_of_an_earlier_start_go(run, tmp_path):
    store = LocalStore(tmp_path / "far")
    store.write("checkpoints/7/state/half", b"x")
    save(run, 1)
    made = begun(run, tmp_path / "far")
    made.wait(20)
    for step in (2, 3, 4):
        save(run, step)
        made.sealed()
        made.wait(20)
    deadline = time.monotonic() + 10
    while step_copy.present(store) != [3, 4]:
        assert time.monotonic() < deadline, step_copy.present(store)
        time.sleep(0.02)
    made.close()


def test_a_place_that_keeps_half_of_a_file_is_found_out_and_the_file_written_again(run, tmp_path):
    save(run, 1)
    path = run / "checkpoints" / "1"
    victim = layout.read_manifest(path).shards["params/w"][0].file
    short = [victim]

    class Short(LocalStore):
        def write_chunks(self, name, chunks, size):
            if any(name.endswith(one) for one in short):
                return self.write(name, b"".join(chunks())[: size // 2])
            return super().write_chunks(name, chunks, size)

    copy, store = step_copy.StepCopy(Short(tmp_path / "far"), path), LocalStore(tmp_path / "far")
    with pytest.raises(OSError, match=f"{victim} has .* bytes, though"):
        copy.run(lambda: None)
    assert step_copy.steps_at(store) == []
    short.clear()
    copy.run(lambda: None)
    step_copy.fetch_step(store, 1, tmp_path / "back")
    assert layout.check_files(tmp_path / "back" / "1") == layout.check_files(path)


def test_a_step_is_deleted_so_that_a_kill_leaves_none(run, tmp_path):
    save(run, 1)
    deleted = []

    class Recording(LocalStore):
        def delete(self, name):
            deleted.append(name.rpartition("/")[2])
            super().delete(name)

    store = Recording(tmp_path / "far")
    step_copy.StepCopy(store, run / "checkpoints" / "1").run(lambda: None)
    step_copy.delete_step(store, 1)
    assert deleted[:2] == [COMMIT_FILE, MANIFEST]
    assert store.files() == {}


@pytest.mark.parametrize("has_step", [True, False])
def test_where_nothing_is_here_a_place_that_does_not_say_what_it_has_is_no_fresh_start(run, tmp_path, has_step):
    (tmp_path / "far").write_text("a file where a folder belongs")
    if has_step:
        save(run, 1)
    made = locations_of(run, tmp_path / "far")
    made.look()
    if has_step:
        assert made.fetch() is None, "training goes on from what is here"
    else:
        with pytest.raises(LocationsUnknown, match=r"far cannot be found out.*repair that place"):
            made.fetch()


def test_of_copies_the_newest_sound_one_is_fetched_wherever_it_is(run, tmp_path):
    for name, steps in (("a", (1, 3)), ("b", (1, 2))):
        save(tmp_path / name, *steps)
    damage(tmp_path / "a" / "checkpoints" / "3")
    heard = []
    made = locations_of(run, tmp_path / "a", tmp_path / "b", event=lambda kind, **fields: heard.append((kind, fields)))
    made.look()
    assert made.fetch() == 2
    made.tell()
    assert layout.list_steps(run / "checkpoints") == [2]
    assert [(kind, fields["step"], fields["location"]) for kind, fields in heard] == [
        ("rejected", 3, str(tmp_path / "a")),
        ("fetched", 2, str(tmp_path / "b")),
    ]


def test_a_fetch_that_a_kill_cut_short_is_swept(run, tmp_path):
    save(tmp_path / "a", 1)
    left = run / "checkpoints" / "1.fetching"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    made = locations_of(run, tmp_path / "a")
    made.look()
    assert made.fetch() == 1
    assert not left.exists()


def test_threads_end_with_the_run(run, tmp_path):
    save(run, 1)
    made = begun(run, tmp_path / "far", tmp_path / "other")
    made.wait(20)
    made.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if "far" in name or "other" in name]
