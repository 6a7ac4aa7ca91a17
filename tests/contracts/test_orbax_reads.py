"""Steps that persisters write, without JAX and without Orbax: stock Orbax and our own loader read them bit for bit."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxscale import tree
from jaxscale.checkpoint.boxes import box_of
from jaxscale.checkpoint.finalise import finalise
from jaxscale.checkpoint.layout import COMMIT_FILE, is_sealed
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.checkpoint.persist import persist
from jaxscale.checkpoint.restore import restore
from jaxscale.checkpoint.room import make_room
from jaxscale.checkpoint.slot import ArrayInfo, SlotError, SlotWriter
from jaxscale.train.protocols import Record

SPECS = {
    "params/w": (P("x", "y"), (64, 32), "float32"),
    "params/half": (P("x"), (16, 4), "bfloat16"),
    "params/norm": (P(), (5,), "float32"),
    "opt/count": (P(), (), "int32"),
    "mask": (P("y"), (4,), "bool"),
    "key": (P(), (2,), "uint32"),
    "small": (P(None, "y"), (3, 8), "float8_e4m3fn"),
}
RECORD = {
    "step": 7,
    "row": 56,
    "config": {"name": "test"},
    "data": {},
    "environment": {"packages": {"jax": "1"}},
    "metrics_line": {"step": 7, "loss": float("inf")},
    "best": {},
    "epoch": 2,
}


@pytest.fixture(name="mesh")
def _mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)


def values():
    random = np.random.default_rng(3)
    return {
        path: (random.integers(0, 2, shape) if dtype == "bool" else random.normal(size=shape) * 8).astype(dtype)
        for path, (_, shape, dtype) in SPECS.items()
    }


def slots(folder, mesh, found, hosts=2):
    """Slot files of `hosts` hosts, each with the unique shards of its half of the devices."""
    arrays = {path: ArrayInfo(shape, dtype) for path, (_, shape, dtype) in SPECS.items()}
    devices = list(mesh.devices.flat)
    per_host = len(devices) // hosts
    shards = [[] for _ in range(hosts)]
    for path, (spec, shape, _) in SPECS.items():
        array = jax.device_put(found[path], NamedSharding(mesh, spec))
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                shards[devices.index(shard.device) // per_host].append((path, box_of(shard.index, shape), shard.data))
    for rank, held in enumerate(shards):
        path = folder / f"host-{rank}"
        writer = SlotWriter(path, "job", f"h{rank}", rank, arrays, [(name, box) for name, box, _ in held])
        writer.begin(2, 7)
        for index, (*_, data) in enumerate(held):
            writer.view(index)[...] = np.asarray(data)
        writer.seal(RECORD)
        writer.close()
    return [folder / f"host-{rank}" for rank in range(hosts)]


def abstract(mesh):
    return tree.unflatten(
        {p: jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for p, (spec, s, d) in SPECS.items()}
    )


@pytest.fixture(name="step")
def _step(tmp_path, mesh):
    path = tmp_path / "checkpoints" / "7"
    make_room(path, 2)
    for slot in slots(tmp_path, mesh, values()):
        persist([slot], "job", 2, 7, path)
    assert not is_sealed(path)
    finalise(path, 2, 2, dict(mesh.shape))
    return path


def same(state):
    wrong = [
        path
        for path, leaf in tree.flatten(state).items()
        if np.asarray(leaf).tobytes() != values()[path].tobytes() or leaf.dtype != SPECS[path][2]
    ]
    assert wrong == []


def test_our_loader_reads_it_on_another_mesh(step):
    other = jax.make_mesh((2, 2), ("y", "x"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(other):
        state, record = restore(step.parent, 7, abstract(other))
    same(state)
    assert record == Record(**RECORD)


def test_stock_orbax_reads_it(step, mesh):
    state = ocp.load_checkpointables(step, {"state": abstract(mesh)})["state"]
    same(state)
    with ocp.training.Checkpointer(step.parent) as checkpointer:
        assert [found.step for found in checkpointer.checkpoints] == [7]


def test_whoever_may_not_commit_makes_no_step(tmp_path, mesh):
    """`allowed` is asked once all is written but what makes it a step."""
    path = tmp_path / "checkpoints" / "7"
    make_room(path, 2)
    for slot in slots(tmp_path, mesh, values()):
        persist([slot], "job", 2, 7, path)

    def refused():
        raise PermissionError("the run is another job's")

    with pytest.raises(PermissionError):
        finalise(path, 2, 2, {}, allowed=refused)
    assert not is_sealed(path)
    assert not (path / COMMIT_FILE).exists()
    finalise(path, 2, 2, {})
    assert is_sealed(path)


def test_without_a_part_it_is_no_step(tmp_path, mesh):
    path = tmp_path / "checkpoints" / "7"
    make_room(path, 2)
    first, second = slots(tmp_path, mesh, values())
    persist([first], "job", 2, 7, path)
    with pytest.raises(DamagedCheckpoint, match=r"process-1.json is missing"):
        finalise(path, 2, 2, {})
    with pytest.raises(DamagedCheckpoint, match="nobody has written"):
        finalise(path, 1, 2, {})
    assert not (path / COMMIT_FILE).exists()
    persist([second], "job", 2, 7, path)
    finalise(path, 2, 2, {})
    assert is_sealed(path)


def test_a_slot_that_is_written_over_is_found_out(tmp_path, mesh):
    first, _ = slots(tmp_path, mesh, values())
    data = bytearray(first.read_bytes())
    data[5000] ^= 1
    first.write_bytes(data)
    make_room(tmp_path / "checkpoints" / "7", 2)
    with pytest.raises(SlotError, match="damaged or was written over"):
        persist([first], "job", 2, 7, tmp_path / "checkpoints" / "7")
    with pytest.raises(SlotError, match="step 8 of epoch 2 is in no slot: host-0 holds step 7 of epoch 2"):
        persist([first], "job", 2, 8, tmp_path / "checkpoints" / "8")
