"""Saving: bits, retention, donation, failures. What restore refuses is in test_restore.py."""

import contextlib
import dataclasses
import json
import threading

import jax
import pytest
from states import SHAPES, make_abstract, make_mesh, make_record, make_state, same_bits

from jaxscale import tree
from jaxscale.checkpoint import durable, layout
from jaxscale.checkpoint.durable import DurableCheckpoints, SaveFailed
from jaxscale.checkpoint.manifest import digest_of_value
from jaxscale.checkpoint.restore import list_steps, newest_step, restore
from jaxscale.checkpoint.written import Part
from jaxscale.config import Config, config_hash, to_dict
from jaxscale.models.transformer_config import TransformerConfig


@pytest.fixture(name="mesh")
def _mesh():
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        yield mesh


def save(folder, mesh, steps, keep=3, **options):
    checkpoints = DurableCheckpoints(folder, every=1, keep=keep, **options)
    for step in steps:
        checkpoints.offer(step, make_state(mesh, seed=step), make_record(step), final=True)
    checkpoints.close()


class Saves:
    """Takes the place of Orbax: each save runs until it is let go, and fails when told to."""

    def __init__(self, monkeypatch):
        self.paths, self.fail, self.go = [], False, threading.Event()
        self.go.set()
        monkeypatch.setattr(durable, "begin_save", self.begin)
        monkeypatch.setattr(durable, "own_part", lambda *_: Part({}, {}))  # it writes no arrays to be read back

    def begin(self, path, state):
        assert state.keys() >= {"params", "opt"}
        self.paths.append(path)
        return self

    def result(self, timeout):
        self.go.wait(timeout)
        if self.fail:
            raise Exception("INTERNAL: No space left on device")  # as Orbax does
        self.paths[-1].mkdir(parents=True)
        (self.paths[-1] / layout.COMMIT_FILE).touch()

    @property
    def steps(self):
        return [int(path.name) for path in self.paths]


def test_a_state_and_its_record_come_back_bit_for_bit(tmp_path, mesh):
    save(tmp_path, mesh, [7])
    state, record = restore(tmp_path, 7, make_abstract(mesh))
    assert same_bits(state, seed=7) == []
    assert record == make_record(7)
    for path, leaf in tree.flatten(state).items():
        assert leaf.sharding == tree.flatten(make_abstract(mesh))[path].sharding


def test_a_checkpoint_has_its_config_and_the_hash_of_it(tmp_path, mesh):
    """The same for a config that was read back from JSON, as after a resume; and one without a hash is still read."""
    config = Config("test", TransformerConfig(window=(8, 0)), seed=7, steps=9)
    checkpoints = DurableCheckpoints(tmp_path, every=1, keep=2)
    for step, told in ((1, to_dict(config)), (2, json.loads(json.dumps(to_dict(config))))):
        checkpoints.offer(step, make_state(mesh), make_record(step, config=told), final=True)
    for step in (1, 2):
        manifest = json.loads((tmp_path / str(step) / layout.MANIFEST).read_bytes())
        assert manifest["config_hash"] == config_hash(config) != config_hash(dataclasses.replace(config, seed=8))
        assert json.loads((tmp_path / str(step) / "config.json").read_bytes()) == to_dict(config)
    del manifest["config_hash"], manifest["digest"]
    manifest["digest"] = digest_of_value(manifest)
    layout.write_json(tmp_path / "2" / layout.MANIFEST, manifest)
    assert restore(tmp_path, 2, make_abstract(mesh))[1] == make_record(2, config=to_dict(config))


def test_no_entry_of_the_state_is_left_behind(tmp_path, mesh):
    """One bit is flipped in each entry in turn before the save; what is loaded differs there and nowhere else."""

    checkpoints = DurableCheckpoints(tmp_path, every=1, keep=len(SHAPES))
    for step, path in enumerate(SHAPES, start=1):
        checkpoints.offer(step, make_state(mesh, flipped=path), make_record(step), final=True)
    for step, path in enumerate(SHAPES, start=1):
        assert same_bits(restore(tmp_path, step, make_abstract(mesh))[0], seed=0) == [path]


@pytest.mark.parametrize("sizes", [{"tensor": 2, "fsdp": 2}, {}], ids=["tensor2-fsdp2", "one-device"])
def test_saved_on_eight_devices_it_loads_on_fewer(tmp_path, mesh, sizes):
    save(tmp_path, mesh, [1])
    other = make_mesh(**sizes)
    state, _ = restore(tmp_path, 1, make_abstract(other))
    assert same_bits(state, seed=1) == []
    assert all(leaf.sharding.mesh == other for leaf in tree.flatten(state).values())


def test_the_newest_are_kept(tmp_path, mesh):
    save(tmp_path, mesh, [1, 2, 3, 4, 5], keep=2)
    assert layout.numbered(tmp_path) == list_steps(tmp_path) == [4, 5]
    assert newest_step(tmp_path) == 5


def test_a_refused_step_makes_room_for_good_ones(tmp_path, mesh):
    save(tmp_path, mesh, [2, 4, 6])
    checkpoints = DurableCheckpoints(tmp_path, every=1, keep=3, restored=4, refused={6})
    for step, there in ((5, [2, 4, 5, 6]), (7, [4, 5, 7]), (8, [5, 7, 8])):
        checkpoints.offer(step, make_state(mesh, seed=step), make_record(step), final=True)
        assert layout.numbered(tmp_path) == there


def test_a_refused_step_that_is_saved_again_is_as_good_as_any(tmp_path, mesh):
    save(tmp_path, mesh, [4, 6])
    checkpoints = DurableCheckpoints(tmp_path, every=1, keep=2, restored=4, refused={6})
    for step, there in ((6, [4, 6]), (8, [6, 8])):
        checkpoints.offer(step, make_state(mesh, seed=step), make_record(step), final=True)
        assert layout.numbered(tmp_path) == there


def test_buffers_donated_right_after_the_offer_are_saved_as_they_were(tmp_path, mesh):
    @jax.jit
    def scramble(state):
        return jax.tree.map(lambda x: (x * 3 + 1).astype(x.dtype), state)

    step_with_donation = jax.jit(scramble, donate_argnums=0)
    checkpoints = DurableCheckpoints(tmp_path, every=1, keep=9)
    for seed in range(1, 5):
        state = make_state(mesh, seed=seed)
        checkpoints.offer(seed, state, make_record(seed))
        for _ in range(3):
            state = step_with_donation(state)
        checkpoints.close()
        assert same_bits(restore(tmp_path, seed, make_abstract(mesh))[0], seed=seed) == []


def test_a_step_that_is_not_due_is_not_saved(tmp_path, mesh, monkeypatch):
    saves = Saves(monkeypatch)
    checkpoints = DurableCheckpoints(tmp_path, every=5, keep=3)
    for step in range(1, 12):
        assert checkpoints.wants(step) == (step % 5 == 0)
        checkpoints.offer(step, make_state(mesh), make_record(step))
        checkpoints.close()
    assert saves.steps == [5, 10]
    assert not DurableCheckpoints(tmp_path, every=0, keep=3).wants(10)


def test_a_due_step_is_skipped_while_a_save_runs_but_the_last_waits(tmp_path, mesh, monkeypatch):
    saves, events = Saves(monkeypatch), []
    checkpoints = DurableCheckpoints(tmp_path, 1, 3, event=lambda kind, **fields: events.append((kind, fields)))
    saves.go.clear()
    checkpoints.offer(1, make_state(mesh), make_record(1))
    checkpoints.offer(2, make_state(mesh), make_record(2))
    assert saves.steps == [1]
    assert [(kind, fields["what"]) for kind, fields in events] == [("alarm", "save skipped")]
    threading.Timer(0.2, saves.go.set).start()
    checkpoints.offer(3, make_state(mesh), make_record(3), final=True)
    assert list_steps(tmp_path) == [1, 3]


def test_that_a_save_is_skipped_is_told_by_one_process(tmp_path, mesh, monkeypatch):
    saves, events = Saves(monkeypatch), []
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    checkpoints = DurableCheckpoints(tmp_path, 1, 3, event=lambda kind, **_: events.append(kind))
    saves.go.clear()
    for step in (1, 2):
        checkpoints.offer(step, make_state(mesh), make_record(step))
    saves.go.set()
    checkpoints.close()
    assert (saves.steps, events) == ([1], [])


def test_the_last_state_is_not_saved_twice(tmp_path, mesh, monkeypatch):
    saves = Saves(monkeypatch)
    checkpoints = DurableCheckpoints(tmp_path, 1, 3)
    checkpoints.offer(4, make_state(mesh), make_record(4))
    checkpoints.offer(4, make_state(mesh), make_record(4), final=True)
    assert saves.steps == [4]
    DurableCheckpoints(tmp_path, 1, 3, restored=4).offer(4, make_state(mesh), make_record(4), final=True)
    assert saves.steps == [4]


def test_a_failed_save_is_reported_once_and_the_next_one_tried(tmp_path, mesh, monkeypatch, caplog):
    saves, events = Saves(monkeypatch), []
    checkpoints = DurableCheckpoints(tmp_path, 1, 3, event=lambda kind, **fields: events.append((kind, fields)))
    saves.fail = True
    checkpoints.offer(1, make_state(mesh), make_record(1))
    checkpoints._save.wait()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "step 1 could not be saved" in caplog.text
    assert "is full" in caplog.text
    saves.fail = False
    checkpoints.offer(2, make_state(mesh), make_record(2))
    checkpoints.close()
    assert list_steps(tmp_path) == [2]
    assert [(kind, fields.get("what")) for kind, fields in events] == [("alarm", "save failed"), ("sealed", None)]
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


@pytest.mark.parametrize(("step", "final", "goes_on"), [(1, False, True), (100, False, False), (7, True, False)])
def test_training_is_said_to_go_on_only_where_it_does(tmp_path, mesh, monkeypatch, caplog, step, final, goes_on):
    saves = Saves(monkeypatch)
    checkpoints = DurableCheckpoints(tmp_path, 1, 3)
    saves.fail = True
    assert make_record(step).config["steps"] == 100
    with contextlib.suppress(SaveFailed):
        checkpoints.offer(step, make_state(mesh), make_record(step), final=final)
        checkpoints.close()
    assert f"step {step} could not be saved" in caplog.text
    assert ("training goes on" in caplog.text) == goes_on


def test_a_disk_that_takes_no_event_either_does_not_stop_the_training(tmp_path, mesh, monkeypatch, caplog):
    def event(kind, **_):
        raise OSError(f"no room for {kind}")

    saves = Saves(monkeypatch)
    checkpoints = DurableCheckpoints(tmp_path, 1, 3, event=event)
    saves.fail = True
    checkpoints.offer(1, make_state(mesh), make_record(1))
    checkpoints._save.wait()
    saves.fail = False
    checkpoints.offer(2, make_state(mesh), make_record(2), final=True)
    assert "no room for alarm" in caplog.text
    assert list_steps(tmp_path) == [2]


@pytest.mark.parametrize("final", [True, False])
def test_a_run_whose_last_state_was_not_saved_ends_with_an_error(tmp_path, mesh, monkeypatch, final):
    saves = Saves(monkeypatch)
    checkpoints = DurableCheckpoints(tmp_path, 1, 3)
    saves.fail = True
    if not final:
        checkpoints.offer(3, make_state(mesh), make_record(3))
    with pytest.raises(SaveFailed, match="after step 3 could not be saved"):
        checkpoints.offer(3, make_state(mesh), make_record(3), final=True) if final else checkpoints.close()


def test_a_folder_that_cannot_be_made_is_a_failed_save_not_a_crash(tmp_path, mesh):
    checkpoints = DurableCheckpoints(tmp_path / "checkpoints", 1, 3)
    (tmp_path / "checkpoints").write_text("")
    checkpoints.offer(1, make_state(mesh), make_record(1))
    with pytest.raises(SaveFailed, match="step 1"):
        checkpoints.close()


def test_a_step_comes_to_exist_only_after_its_metrics_are_durable(tmp_path, mesh):
    seen, events = [], []
    checkpoints = DurableCheckpoints(
        tmp_path,
        1,
        3,
        event=lambda kind, **fields: events.append((kind, fields)),
        before_seal=lambda: seen.append(list_steps(tmp_path)),
    )
    checkpoints.offer(1, make_state(mesh), make_record(1), final=True)
    assert (seen, list_steps(tmp_path)) == ([[]], [1])
    ((kind, fields),) = events
    assert kind == "sealed"
    assert (fields["tier"], fields["step"]) == ("durable", 1)
    assert fields["bytes"] > sum(leaf.nbytes for leaf in tree.flatten(make_state(mesh)).values())
    assert 0 <= fields["blocked_seconds"] <= fields["seconds"]


def test_litter_of_crashed_saves_is_swept_and_foreign_folders_are_not(tmp_path, mesh):
    save(tmp_path, mesh, [1])
    (tmp_path / "2" / "state").mkdir(parents=True)
    (tmp_path / "2" / "state" / "half").write_text("x")
    (tmp_path / "notes").mkdir()
    assert list_steps(tmp_path) == [1]
    DurableCheckpoints(tmp_path, 1, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "notes"]


def test_a_damaged_step_is_replaced_when_training_comes_by_again(tmp_path, mesh):
    save(tmp_path, mesh, [1, 2])
    (tmp_path / "2" / "record.json").write_text("{")
    checkpoints = DurableCheckpoints(tmp_path, 1, 3, restored=1)
    checkpoints.offer(2, make_state(mesh, seed=5), make_record(2), final=True)
    assert same_bits(restore(tmp_path, 2, make_abstract(mesh))[0], seed=5) == []


def test_a_state_holds_arrays_only(tmp_path, mesh):
    state = make_state(mesh) | {"step": 3}
    with pytest.raises(TypeError, match=r"^step of the state is a int"):
        DurableCheckpoints(tmp_path, 1, 3).offer(1, state, make_record(1))
    with pytest.raises(ValueError, match="record of step 2 was offered with the state of step 1"):
        DurableCheckpoints(tmp_path, 1, 3).offer(1, make_state(mesh), make_record(2))


def test_stock_orbax_reads_a_step(tmp_path, mesh):
    from orbax.checkpoint import v1 as ocp

    save(tmp_path, mesh, [1])
    loaded = ocp.load_checkpointables(tmp_path / "1", {"state": make_abstract(mesh)})["state"]
    assert same_bits(loaded, seed=1) == []
    assert set(ocp.checkpointables_metadata(tmp_path / "1").metadata) == {"state"}


def test_orbax_can_be_imported_ahead():
    thread = durable.warm_up()
    thread.join()
    assert thread.daemon
