"""Deltas: what the step before has is shared with it, and every step stays whole by itself."""

import os
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from states import make_mesh, make_record

from jaxscale import tree
from jaxscale.checkpoint import layout, sharing
from jaxscale.checkpoint.boxes import lengths, uncovered
from jaxscale.checkpoint.durable import DurableCheckpoints, load_orbax
from jaxscale.checkpoint.finalise import finalise
from jaxscale.checkpoint.layout import DamagedCheckpoint
from jaxscale.checkpoint.memory import MemorySnapshots
from jaxscale.checkpoint.persist import persist
from jaxscale.checkpoint.restore import restore
from jaxscale.checkpoint.room import make_room
from jaxscale.checkpoint.slot import SlotError
from jaxscale.checkpoint.zarr_files import chunk_shape
from jaxscale.cli import main
from jaxscale.testing.checkpoints import flip

SHAPES = {"params/base": (8, 64), "params/adapter": (8, 4), "opt/mu/adapter": (8, 4), "params/table": (1024, 16)}


def values_at(step):
    """A base that never changes, an adapter that always does, a table of which one row does."""
    random = np.random.default_rng(1)
    values = {path: random.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}
    for path in values:
        if "adapter" in path:
            values[path] += step
    values["params/table"][step] += step
    return values


def state_at(step, mesh):
    sharding = NamedSharding(mesh, P("fsdp"))
    return tree.unflatten({path: jax.device_put(value, sharding) for path, value in values_at(step).items()})


def abstract(mesh):
    leaf = {p: jax.ShapeDtypeStruct(s, "float32", sharding=NamedSharding(mesh, P("fsdp"))) for p, s in SHAPES.items()}
    return tree.unflatten(leaf)


@pytest.fixture(name="mesh")
def _mesh():
    mesh = make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        yield mesh


def by_orbax(tmp_path, mesh):
    """Saves as a plain run does."""
    checkpoints = DurableCheckpoints(tmp_path / "checkpoints", every=1, keep=99)

    def save(step):
        checkpoints.offer(step, state_at(step, mesh), make_record(step), final=True)

    return save


def by_persister(tmp_path, mesh):
    """Saves as a supervised host does."""
    slots = tmp_path / "slots"
    snapshots = MemorySnapshots(
        slots, job="job", host="host-0", rank=0, epoch=1, every=1, generations=1, verdicts=lambda: (-1, 99),
        notify=lambda *_: None,
    )  # fmt: skip

    def save(step):
        snapshots.offer(step, state_at(step, mesh), make_record(step), final=True)
        path = tmp_path / "checkpoints" / str(step)
        make_room(path, 1)
        persist(sorted(slots.glob("gen-*")), "job", 1, step, path)
        finalise(path, 1, 1, {})

    return save


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture(name="save", params=[by_orbax, by_persister])
def _save(request, tmp_path, mesh):
    return request.param(tmp_path, mesh)


def check(folder, step, mesh):
    """Both read all of it, and right."""
    ours, _ = restore(folder, step, abstract(mesh))
    orbax = load_orbax().load_checkpointables(folder / str(step), {layout.STATE_ITEM: abstract(mesh)})
    for state in (ours, orbax[layout.STATE_ITEM]):
        for path, value in values_at(step).items():
            np.testing.assert_array_equal(tree.flatten(state)[path], value, err_msg=path)


def inodes(folder, step, path):
    name = folder / str(step) / "state" / path.replace("/", ".") / "c"
    return [file.stat().st_ino for file in sorted(name.rglob("*")) if file.is_file()]


def test_what_does_not_change_is_shared_and_every_step_is_whole(save, folder, mesh):
    for step in (1, 2, 3):
        save(step)
    assert inodes(folder, 1, "params/base") == inodes(folder, 2, "params/base") == inodes(folder, 3, "params/base")
    for path in ("params/adapter", "opt/mu/adapter"):
        assert not set(inodes(folder, 1, path)) & set(inodes(folder, 2, path))
    for step in (1, 2, 3):
        check(folder, step, mesh)
    layout.delete_step(folder / "1")
    shutil.rmtree(folder / "2")
    check(folder, 3, mesh)


def test_the_list_says_what_lies_on_the_disk(tmp_path, save, folder, capsys):
    for step in (1, 2):
        save(step)
    (tmp_path / "config.json").write_text("{}")
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    files = {}
    for file in folder.rglob("*"):
        if file.is_file():
            files[file.stat().st_ino] = file.stat().st_size
    assert sharing.on_disk(folder, (1, 2)) == sum(files.values())
    assert "on the disk: what did not change is shared) at" in capsys.readouterr().out


def test_not_too_many_steps_share_a_file(save, folder, mesh):
    for step in range(1, 2 * sharing.MOST + 2):
        save(step)
    found = [inodes(folder, step, "params/base")[0] for step in range(1, 2 * sharing.MOST + 2)]
    assert [found.count(inode) for inode in dict.fromkeys(found)] == [sharing.MOST, sharing.MOST, 1]
    check(folder, 2 * sharing.MOST + 1, mesh)


def test_damage_is_found_in_all_steps_that_share_it(save, folder, mesh):
    save(1)
    save(2)
    file = next(file for file in (folder / "1/state/params.base/c").rglob("*") if file.is_file())
    flip(file, 77)
    for step in (1, 2):
        with pytest.raises(DamagedCheckpoint, match="is damaged"):
            restore(folder, step, abstract(mesh))


def test_a_step_that_is_not_whole_is_not_shared_with(save, folder, mesh):
    save(1)
    save(2)
    (folder / "2" / layout.MANIFEST).write_text("{")
    save(3)
    assert inodes(folder, 3, "params/base") == inodes(folder, 1, "params/base")
    for file in (folder / "1/state/params.base/c").rglob("*"):
        if file.is_file():  # shorter than it was: whoever looks at sizes sees it
            os.truncate(file, 4)
    (folder / "3" / layout.COMMIT_FILE).unlink()
    save(4)
    assert inodes(folder, 4, "params/base") != inodes(folder, 1, "params/base")
    check(folder, 4, mesh)


def test_without_links_everything_is_written(save, folder, mesh, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save(1)
    save(2)
    assert not set(inodes(folder, 1, "params/base")) & set(inodes(folder, 2, "params/base"))
    check(folder, 2, mesh)


def test_a_step_that_is_saved_again_leaves_the_one_before_as_it_was(tmp_path, folder, mesh):
    save = by_persister(tmp_path, mesh)
    save(1)
    save(2)
    before = (folder / "1" / layout.MANIFEST).read_bytes()
    save(2)
    assert (folder / "1" / layout.MANIFEST).read_bytes() == before
    check(folder, 1, mesh)
    check(folder, 2, mesh)


def test_rows_of_a_table_that_did_not_change_are_shared_by_block(tmp_path, folder, mesh, monkeypatch):
    monkeypatch.setattr(sharing, "BLOCK_BYTES", 4096)
    monkeypatch.setattr("jaxscale.checkpoint.persist.BLOCK_BYTES", 4096)
    save = by_persister(tmp_path, mesh)
    save(1)
    save(600)
    one, other = inodes(folder, 1, "params/table"), inodes(folder, 600, "params/table")
    assert len(one) == len(other) == 1024 * 16 * 4 // 4096
    assert [n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b], "the rows 1 and 600"
    assert sum(a == b for a, b in zip(one, other, strict=True)) == len(one) - 2
    check(folder, 1, mesh)
    check(folder, 600, mesh)


def test_damage_in_the_slot_of_a_shard_in_blocks_is_found(tmp_path, folder, mesh, monkeypatch):
    monkeypatch.setattr(sharing, "BLOCK_BYTES", 4096)
    save = by_persister(tmp_path, mesh)
    save(1)
    slot = next((tmp_path / "slots").glob("gen-*"))
    flip(slot, 8 * (slot.stat().st_size // 2))
    make_room(folder / "2", 1)
    with pytest.raises(SlotError, match="is damaged or was written over"):
        persist([slot], "job", 1, 1, folder / "2")


@given(st.integers(1, 300), st.integers(1, 4096), st.integers(0, 50))
def test_blocks_are_chunks_of_one_grid(rows, row_bytes, at):
    box = ((at * rows, (at + 1) * rows), (0, row_bytes))
    before, sharing.BLOCK_BYTES = sharing.BLOCK_BYTES, 1 << 12
    try:
        found = sharing.blocks(box, rows * row_bytes)
        assert uncovered(box, found) is None
        assert sum(lengths(one)[0] for one in found) == rows
        assert lengths(found[0]) == chunk_shape("x", found)
        if len(found) > 1:
            assert lengths(found[0])[0] * row_bytes >= sharing.BLOCK_BYTES // 16
    finally:
        sharing.BLOCK_BYTES = before
