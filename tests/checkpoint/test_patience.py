"""Storage that is away for a moment costs a wait, and neither a step nor a save."""

import errno

import jax
import pytest
from states import make_abstract, make_mesh, make_record, make_state, same_bits

from jaxscale.checkpoint import durable, layout, patience
from jaxscale.checkpoint.durable import DurableCheckpoints, SaveFailed
from jaxscale.checkpoint.layout import DamagedCheckpoint, list_steps
from jaxscale.checkpoint.patience import may_pass
from jaxscale.checkpoint.restore import restore_newest

AWAY, FULL = OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def mesh():
    mesh = make_mesh(fsdp=4)
    with jax.set_mesh(mesh):
        yield mesh


def failing(monkeypatch, module, name, times, error=AWAY):
    """Makes a function fail so many times before it works. Returns the list of its calls."""
    calls, real = [], getattr(module, name)

    def sometimes(*arguments):
        calls.append(arguments)
        if len(calls) <= times:
            raise error
        return real(*arguments)

    monkeypatch.setattr(module, name, sometimes)
    return calls


def save(folder, steps):
    events = []
    checkpoints = DurableCheckpoints(folder, 1, 3, event=lambda kind, **fields: events.append((kind, fields)))
    for step in steps:
        checkpoints.offer(step, make_state(jax.sharding.get_mesh(), seed=step), make_record(step), final=True)
    checkpoints.close()
    return events


def test_a_step_that_cannot_be_read_for_a_moment_is_the_one_that_is_restored(tmp_path, mesh, monkeypatch):
    save(tmp_path, [1, 2])
    away = DamagedCheckpoint("manifest.json cannot be read")
    away.__cause__ = AWAY
    calls = failing(monkeypatch, layout, "_read_json", 2, away)
    rejected = []
    state, record = restore_newest(tmp_path, make_abstract(mesh), lambda step, _: rejected.append(step))
    assert (record.step, rejected, same_bits(state, seed=2)) == (2, [], [])
    assert len(calls) > 2


def test_a_step_that_cannot_be_read_for_long_gives_way_to_an_older_one(tmp_path, mesh, monkeypatch):
    save(tmp_path, [1, 2])
    monkeypatch.setattr(patience, "STORAGE_SECONDS", 0.5)
    real = layout.read_manifest

    def read_manifest(path):
        if path.name == "2":
            raise DamagedCheckpoint("cannot be read") from AWAY
        return real(path)

    monkeypatch.setattr(layout, "read_manifest", read_manifest)
    rejected = []
    _, record = restore_newest(tmp_path, make_abstract(mesh), lambda step, _: rejected.append(step))
    assert (record.step, rejected) == (1, [2])


@pytest.mark.usefixtures("mesh")
def test_a_seal_that_fails_for_a_moment_is_tried_again_and_no_alarm(tmp_path, monkeypatch):
    calls = failing(monkeypatch, layout, "seal", 2)
    assert [kind for kind, _ in save(tmp_path, [1])] == ["sealed"]
    assert (len(calls), list_steps(tmp_path)) == (3, [1])


@pytest.mark.usefixtures("mesh")
def test_the_last_state_is_saved_again_where_the_storage_was_away(tmp_path, monkeypatch):
    calls = failing(monkeypatch, durable, "begin_save", 2)
    assert [kind for kind, _ in save(tmp_path, [1])] == ["alarm", "alarm", "sealed"]
    assert (len(calls), list_steps(tmp_path)) == (3, [1])


@pytest.mark.usefixtures("mesh")
def test_a_full_disk_is_not_waited_for(tmp_path, monkeypatch):
    calls = failing(monkeypatch, durable, "begin_save", 99, FULL)
    with pytest.raises(SaveFailed, match="is full"):
        save(tmp_path, [1])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (AWAY, True),
        (TimeoutError(), True),
        (ValueError("UNAVAILABLE: the server is overloaded"), True),
        (FULL, False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ValueError("Failed to parse"), False),
    ],
)
def test_what_may_pass(error, passes):
    assert may_pass(error) == passes
    outer = DamagedCheckpoint("cannot be read")
    outer.__cause__ = error
    assert may_pass(outer) == passes


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_seal_that_failed_anywhere_is_whole_the_second_time(tmp_path, monkeypatch, where, mesh):
    """Nothing that the first attempt left counts as a part of the step."""
    real, failed = layout.write_json, []

    def write_json(path, value):
        if path.name == layout.MANIFEST and not failed:
            failed.append(path)
            if where == "behind":
                real(path, {**value, "more": "than the second attempt writes"})
            else:
                path.with_name(path.name + layout.PARTIAL).write_text("half")
            raise AWAY
        real(path, value)

    monkeypatch.setattr(layout, "write_json", write_json)
    assert [kind for kind, _ in save(tmp_path, [1])] == ["sealed"]
    assert failed
    _, record = restore_newest(tmp_path, make_abstract(mesh))
    assert record.step == 1
