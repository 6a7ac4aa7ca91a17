"""Restoring: what is refused, what is fallen back to, what is said."""

import json
import logging

import jax
import pytest
from states import SHAPES, make_abstract, make_mesh, make_record, make_state, same_bits

from jaxscale import config, tree
from jaxscale.checkpoint import layout
from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.checkpoint.layout import DamagedCheckpoint
from jaxscale.checkpoint.restore import (
    StateMismatch,
    differences,
    list_steps,
    newest_step,
    restore,
    restore_newest,
    restore_params,
    resume_report,
)
from jaxscale.config import ConfigError
from jaxscale.testing.checkpoints import flip


@pytest.fixture(name="mesh")
def _mesh():
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(name="folder")
def _folder(tmp_path, mesh):
    checkpoints = DurableCheckpoints(tmp_path, every=1, keep=3)
    for step in (1, 2):
        checkpoints.offer(step, make_state(mesh, seed=step), make_record(step), final=True)
    return tmp_path


def data_file(folder, step):
    """The file with most of the arrays' bytes."""
    return max((folder / str(step) / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def scramble(path):
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


DAMAGE = {
    "data cut": lambda folder: cut(data_file(folder, 2)),
    "data missing": lambda folder: data_file(folder, 2).unlink(),
    "one bit of an array": lambda folder: flip(data_file(folder, 2), 8 * 100 + 3),
    "one bit behind an array": lambda folder: flip(data_file(folder, 2), -1),
    "one bit of the manifest": lambda folder: flip(folder / "2" / "manifest.json", 8 * 300),
    "layout of an array": lambda folder: scramble(folder / "2" / "state" / "params.embed" / "zarr.json"),
    "tree missing": lambda folder: (folder / "2" / "state" / "_METADATA").unlink(),
    "manifest missing": lambda folder: (folder / "2" / "manifest.json").unlink(),
    "manifest nonsense": lambda folder: (folder / "2" / "manifest.json").write_text("[]"),
    "manifest of another step": lambda folder: (folder / "2" / "manifest.json").write_text(
        (folder / "1" / "manifest.json").read_text()
    ),
    "record cut": lambda folder: cut(folder / "2" / "record.json"),
    "record of the same size but nonsense": lambda folder: scramble(folder / "2" / "record.json"),
    "environment missing": lambda folder: (folder / "2" / "environment.json").unlink(),
}


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {}])
def test_large_files_are_read_and_verified_in_pieces(folder, monkeypatch, sizes):
    monkeypatch.setattr("jaxscale.checkpoint.load_files.CHUNK_BYTES", 64)
    abstract = make_abstract(make_mesh(**sizes))
    state, _ = restore(folder, 2, abstract)
    assert same_bits(state, seed=2) == []
    file = data_file(folder, 2)
    size = file.stat().st_size
    assert size > 64 * 3
    for position in (0, size // 2, size - 1):
        flip(file, 8 * position)
        with pytest.raises(DamagedCheckpoint, match=f"{file.name} is damaged"):
            restore(folder, 2, abstract)
        flip(file, 8 * position)
    restore(folder, 2, abstract)
    cut(file)
    with pytest.raises(DamagedCheckpoint, match="it was written with"):
        restore(folder, 2, abstract)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_step_is_refused_loudly_and_the_older_one_loads(folder, mesh, damage, caplog):
    DAMAGE[damage](folder)
    rejected = []
    with caplog.at_level(logging.WARNING):
        state, record = restore_newest(
            folder, make_abstract(mesh), lambda *step_and_reason: rejected.append(step_and_reason)
        )
    assert record.step == 1
    assert same_bits(state, seed=1) == []
    assert [step for step, _ in rejected] == [2]
    assert "CHECKPOINT OF STEP 2 IS DAMAGED" in caplog.text
    with pytest.raises(DamagedCheckpoint):
        restore(folder, 2, make_abstract(mesh))


@pytest.mark.parametrize("change", [lambda text: text + b" ", lambda text: text[:-1]], ids=["longer", "shorter"])
@pytest.mark.parametrize("name", ["state/_METADATA", "config.json"])
def test_the_size_of_every_file_is_checked_by_name(folder, name, change):
    layout.check_files(folder / "2")
    path = folder / "2" / name
    before = path.read_bytes()
    path.write_bytes(change(before))
    with pytest.raises(DamagedCheckpoint, match=rf"{name} has {len(change(before))} bytes; .* with {len(before)}$"):
        layout.check_files(folder / "2")


def test_when_none_can_be_read_training_does_not_start_afresh(folder, mesh):
    for step in (1, 2):
        data_file(folder, step).unlink()
    with pytest.raises(
        DamagedCheckpoint, match=r"(?s)2 checkpoint.*none can be read.*step 2: .*step 1: .*move the folder"
    ):
        restore_newest(folder, make_abstract(mesh))


def test_only_a_folder_without_finished_saves_starts_afresh(tmp_path, mesh):
    assert restore_newest(tmp_path / "absent", make_abstract(mesh)) is None
    (tmp_path / "3" / "state").mkdir(parents=True)
    assert restore_newest(tmp_path, make_abstract(mesh)) is None
    assert (list_steps(tmp_path), newest_step(tmp_path)) == ([], None)


def test_the_newest_is_taken_when_all_is_well(folder, mesh):
    state, record = restore_newest(folder, make_abstract(mesh))
    assert (record.step, same_bits(state, seed=2)) == (2, [])


CHANGES = {
    "another shape": (
        {"params/embed": ((16, 64), "float32")},
        ["params/embed: checkpoint float32[16,32], this run float32[16,64]"],
    ),
    "another dtype": (
        {"params/norm": ((5,), "bfloat16")},
        ["params/norm: checkpoint float32[5], this run bfloat16[5]"],
    ),
    "one more": (
        {"params/layers/extra": ((8,), "float32")},
        ["params/layers/extra: checkpoint absent, this run float32[8]"],
    ),
    "one fewer": ({"skipped": None}, ["skipped: checkpoint int32[], this run absent"]),
    "two": (
        {"params/norm": ((6,), "float32"), "key": None},
        ["key: checkpoint uint32[2], this run absent", "params/norm: checkpoint float32[5], this run float32[6]"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_of_other_shapes_is_refused_by_name(folder, mesh, change, monkeypatch):
    changes, lines = CHANGES[change]
    monkeypatch.setitem(__import__("states").SPECS, "params/layers/extra", jax.sharding.PartitionSpec())
    wanted = make_abstract(mesh, {path: shape for path, shape in (SHAPES | changes).items() if shape})
    for load in (lambda: restore(folder, 2, wanted), lambda: restore_newest(folder, wanted)):
        with pytest.raises(StateMismatch) as caught:
            load()
        assert str(caught.value).split("\n")[1:-1] == [f"  {line}" for line in lines]


def test_a_long_list_of_differences_is_cut(folder):
    many = {f"params/p{i:02}": ((8,), "float32") for i in range(30)}
    with pytest.raises(StateMismatch, match=r"\.\.\. and 10 more"):
        restore(
            folder,
            1,
            tree.unflatten({path: jax.ShapeDtypeStruct(*shape) for path, shape in (SHAPES | many).items()}),
        )


def test_differences_of_equal_trees():
    arrays = {"a": ((1, 2), "float32")}
    assert differences(arrays, dict(arrays)) == []


def test_weights_alone(folder, mesh):
    wanted = make_abstract(mesh)["params"]
    loaded = restore_params(folder, 2, wanted)
    state = make_state(mesh, seed=2)
    assert same_bits(state | {"params": loaded}, seed=2) == []
    assert tree.flatten(loaded).keys() == tree.flatten(wanted).keys()
    small = {"embed": jax.ShapeDtypeStruct((4, 4), "float32")}
    with pytest.raises(StateMismatch, match=r"params/embed: checkpoint float32\[16,32\], this run float32\[4,4\]"):
        restore_params(folder, 2, small)


def test_weights_prefer_the_moving_average_where_asked(folder, mesh):
    embed = {"embed": make_abstract(mesh)["ema"]["embed"]}
    average = restore_params(folder, 2, embed, average=True)
    assert same_bits(make_state(mesh, seed=2) | {"ema": average}, seed=2) == []
    assert same_bits(make_state(mesh, seed=2) | {"ema": restore_params(folder, 2, embed)}, seed=2) == ["ema/embed"]


def test_what_a_resume_says():
    run = config.Config("test", config.ModelConfig(), steps=7, optim=config.OptimConfig(learning_rate=1e-3))
    lines = resume_report(
        make_record(1), run, {"packages": {"jax": "2"}, "git": {}}, {"tokenizer": "abc", "sources": {"a": "124"}}
    )
    assert lines == [
        "config: optim.learning_rate: 0.0003 -> 0.001",
        'environment: packages.jax: "1" -> "2"',
        'data: sources.a: "123" -> "124"',
    ], "steps is a placement: it changes without a word"
    same = make_record(1)
    assert resume_report(same, config.Config("test", config.ModelConfig()), same.environment, same.data) == []


def test_a_resume_of_another_recipe_is_refused():
    with pytest.raises(ConfigError, match=r"recipe 'test', this run is 'other'; give another --run.dir"):
        resume_report(make_record(1), config.Config("other", config.ModelConfig()), {}, {})


def test_another_format_is_refused(folder):
    path = folder / "2" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(DamagedCheckpoint, match="format 99; this version reads format 2"):
        layout.check_files(folder / "2")
