"""From slots to devices: any mesh to any mesh, bit for bit, around damage, without compiling anything."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from states import SHAPES, make_abstract, make_mesh, make_record, make_state, same_bits

from jaxscale import tree
from jaxscale.checkpoint import assemble as assemble_module
from jaxscale.checkpoint import slot
from jaxscale.checkpoint.assemble import HELD_SHARE, NoGoodCopy, _Filling, assemble
from jaxscale.checkpoint.cover import Copy, choice_from_json, choice_to_json, choose
from jaxscale.checkpoint.memory import MemorySnapshots
from jaxscale.checkpoint.restore import StateMismatch
from jaxscale.checkpoint.slot import SlotError


def snapshot(folder, state, step):
    """Writes one slot of a state and returns the choice to restore it."""
    snapshots = MemorySnapshots(
        folder,
        job="job",
        host="host-0",
        rank=0,
        epoch=1,
        every=1,
        generations=1,
        verdicts=lambda: (-1, -1),
        notify=lambda *_: None,
    )
    snapshots.offer(step, state, make_record(step), final=True)
    snapshots.close()
    file = folder / "gen-0"
    choice = choose([Copy("host-0", str(file), slot.read_slot(file, "job"))], [(1, 0)])
    return choice_from_json(choice_to_json(choice))


def fetch(location, source):
    return slot.read_shard(location.file, source.at(location), SHAPES[source.path][1])


class Counted:
    """Counts fetches, and lets some fail."""

    def __init__(self, fails=lambda *_: None):
        self.calls, self.fails, self.lock = [], fails, threading.Lock()

    def __call__(self, location, source):
        with self.lock:
            self.calls.append((source.path, source.box))
        self.fails(location, source)
        return fetch(location, source)


@pytest.fixture
def compilations():
    found = []

    def listen(event, *_, **__):
        if "compil" in event or "trace" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_from_mesh_to_mesh_to_one_device_bit_for_bit(tmp_path, compilations):
    state = make_state(make_mesh(fsdp=8), seed=5)
    for number, sizes in enumerate([{"fsdp": 2, "tensor": 2}, {}, {"data": 2, "fsdp": 4}, {"tensor": 8}]):
        choice = snapshot(tmp_path / str(number), state, step=3)
        mesh = make_mesh(**sizes)
        abstract = make_abstract(mesh)
        counted = Counted()
        compilations.clear()
        state = assemble(abstract, choice, counted)
        assert compilations == []
        assert same_bits(state, seed=5) == []
        for path, leaf in tree.flatten(state).items():
            wanted = tree.flatten(abstract)[path]
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
        assert len(counted.calls) == len(set(counted.calls)) == len(choice.shards)
    assert choice.record["metrics_line"]["grad_norm"] == float("inf")


def test_the_state_can_be_computed_with_and_donated(tmp_path):
    """Each device has memory of its own: a donated array is overwritten in place, the others are as they were."""
    mesh = make_mesh(fsdp=4)
    state = assemble(make_abstract(mesh), snapshot(tmp_path, make_state(mesh, seed=1), 1), fetch)
    places = addresses(state)
    assert len(set(places)) == len(places)
    flip = jax.jit(lambda s: jax.tree.map(jax.lax.neg, s), donate_argnums=0)
    with jax.set_mesh(mesh):
        state = flip(flip(state))
    assert addresses(state) == places, "donated in place"
    assert same_bits(state, seed=1) == []


def addresses(state):
    leaves = jax.tree.leaves(state)
    return [shard.data.unsafe_buffer_pointer() for leaf in leaves for shard in leaf.addressable_shards]


def test_no_leaf_is_a_window_into_what_was_fetched(tmp_path):
    mesh = make_mesh(fsdp=4)
    given = []

    def keep(location, source):
        given.append(fetch(location, source))
        return given[-1]

    state = assemble(make_abstract(mesh), snapshot(tmp_path, make_state(mesh, seed=1), 1), keep)
    for array in given:
        array.reshape(-1).view(np.uint8)[:] = 0
    assert same_bits(state, seed=1) == []


def test_an_abstract_mesh_stands_for_the_current_one(tmp_path):
    mesh = make_mesh(fsdp=4)
    choice = snapshot(tmp_path, make_state(mesh, seed=1), 1)
    abstract = jax.tree.map(
        lambda x: x.update(sharding=NamedSharding(mesh.abstract_mesh, x.sharding.spec)), make_abstract(mesh)
    )
    with jax.set_mesh(mesh):
        assert same_bits(assemble(abstract, choice, fetch), seed=1) == []
    with pytest.raises(ValueError, match=r"ema/embed is sharded over the mesh .*; call this inside jax.set_mesh"):
        assemble(abstract, choice, fetch)


def two_copies(tmp_path, mesh, seed):
    snapshot(tmp_path / "a", make_state(mesh, seed=seed), 1)
    data = (tmp_path / "a" / "gen-0").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "gen-0").write_bytes(data)
    files = [tmp_path / name / "gen-0" for name in "ab"]
    return files, choose(
        [Copy(f"host-{i}", str(file), slot.read_slot(file, "job")) for i, file in enumerate(files)], []
    )


def damage(file, source):
    data = bytearray(file.read_bytes())
    data[source.locations[0].offset] ^= 1
    file.write_bytes(data)


def test_a_damaged_shard_comes_from_the_next_location(tmp_path):
    mesh = make_mesh(fsdp=4)
    files, choice = two_copies(tmp_path, mesh, seed=2)
    bad, gone = choice.shards[0], choice.shards[-1]
    damage(files[0], bad)

    def fails(location, source):
        if source == gone and location.holder == "host-0":
            raise ConnectionResetError("connection reset by peer")

    seen = []
    counted = Counted(fails)
    state = assemble(make_abstract(mesh), choice, counted, lambda *args: seen.append(args))
    assert same_bits(state, seed=2) == []
    assert {(source, location.holder) for source, location, _ in seen} == {(bad, "host-0"), (gone, "host-0")}
    assert any(f"{files[0]}: {bad.path}" in reason and "is damaged" in reason for _, _, reason in seen)
    assert len(counted.calls) == len(choice.shards) + 2


def in_pieces(rows, spoilt=None):
    """A fetch that gives some rows at a time in one buffer, and finds only then that a location is no good."""

    def fetch_pieces(location, source):
        data = fetch(location, source)
        if not source.box:
            yield (), data
            return
        (first, _), *rest = source.box
        buffer = np.empty_like(data[:rows])
        for start in range(0, len(data), rows):
            part = buffer[: len(data[start : start + rows])]
            part[...] = data[start : start + rows]
            if spoilt == (location.holder, source.path):
                part[...] = 1
            yield ((first + start, first + start + len(part)), *rest), part
            part[...] = 0
        if spoilt == (location.holder, source.path):
            raise SlotError("its digest does not fit")

    return fetch_pieces


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2}, {}])
def test_shards_that_come_in_pieces(tmp_path, rows, sizes):
    """Also where what came of one location turns out damaged at its end."""
    _, choice = two_copies(tmp_path, make_mesh(fsdp=4), seed=6)
    seen = []
    spoilt = ("host-0", "params/layers/mlp")
    state = assemble(
        make_abstract(make_mesh(**sizes)), choice, in_pieces(rows, spoilt), lambda *args: seen.append(args)
    )
    assert same_bits(state, seed=6) == []
    assert {(source.path, location.holder) for source, location, _ in seen} == {(spoilt[1], spoilt[0])}


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"data": 4, "fsdp": 2}])
def test_little_is_held_beside_what_the_devices_have(tmp_path, monkeypatch, sizes):
    shapes = {f"params/w{i:02}": ((64, 64), "float32") for i in range(20)}
    wide = {path: P("fsdp", "tensor") for path in shapes}
    monkeypatch.setattr("states.SPECS", wide)
    monkeypatch.setattr("jaxscale.checkpoint.assemble.HELD_BYTES", 0)
    total, array, held, alive = 20 * 64 * 64 * 4, 64 * 64 * 4, [], []
    begin, put = _Filling._begin, assemble_module._put

    def begun(self, path, box):
        begin(self, path, box)
        held.append(sum(b.nbytes for t in self._targets.values() for b in t.buffers.values()))
        alive.append(self._held)

    puts = []

    def counted(values, places):
        puts.append(len(values))
        return put(values, places)

    monkeypatch.setattr(_Filling, "_begin", begun)
    monkeypatch.setattr(assemble_module, "_put", counted)
    mesh = make_mesh(**sizes)
    values = {path: np.full(shape, i, np.float32) for i, (path, (shape, _)) in enumerate(shapes.items())}
    leaves = {
        path: jax.device_put(value, NamedSharding(make_mesh(fsdp=4), wide[path])) for path, value in values.items()
    }

    def read(location, source):
        return slot.read_shard(location.file, source.at(location), "float32")

    state = assemble(make_abstract(mesh, shapes), snapshot(tmp_path, tree.unflatten(leaves), 1), read)
    for path, leaf in tree.flatten(state).items():
        np.testing.assert_array_equal(leaf, values[path])
    assert held == alive
    assert max(held) <= HELD_SHARE * total + array, "what a shard begins may come on top"
    assert 5 <= len(puts) <= 40, "neither all at once nor each by itself"


def test_where_no_copy_is_good_every_reason_is_named(tmp_path):
    mesh = make_mesh(fsdp=4)
    files, choice = two_copies(tmp_path, mesh, seed=2)
    bad = [s for s in choice.shards if s.path == "params/embed"][1]
    for file in files:
        damage(file, bad)
    seen = []
    with pytest.raises(NoGoodCopy) as caught:
        assemble(make_abstract(mesh), choice, fetch, lambda *args: seen.append(args))
    text = str(caught.value)
    assert "1 of the" in text
    assert "params/embed [0:16, 8:16]: host-0: " in text
    assert "; host-1: " in text
    assert len(seen) == 2


def test_a_fetch_of_another_shape_is_refused(tmp_path):
    mesh = make_mesh(fsdp=4)
    _, choice = two_copies(tmp_path, mesh, seed=2)

    def wrong(location, source):
        data = fetch(location, source)
        return data.astype(np.float64) if source.path == "params/norm" else data

    with pytest.raises(NoGoodCopy, match=r"params/norm \[0:5\]: host-0: it came as float64\[5\]; host-1"):
        assemble(make_abstract(mesh), choice, wrong)


def test_errors_of_the_program_are_not_taken_for_damage(tmp_path):
    mesh = make_mesh(fsdp=4)

    def broken(*_):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        assemble(make_abstract(mesh), snapshot(tmp_path, make_state(mesh), 1), broken)


def test_other_arrays_are_listed_before_anything_is_fetched(tmp_path):
    mesh = make_mesh(fsdp=4)
    choice = snapshot(tmp_path, make_state(mesh), 1)
    shapes = {**SHAPES, "params/norm": ((6,), "float32"), "params/scale": ((16,), "float32")}
    del shapes["key"]
    counted = Counted()
    with pytest.raises(StateMismatch) as caught:
        assemble(make_abstract(mesh, shapes), choice, counted)
    text = str(caught.value)
    assert "checkpoint of step 1 holds other arrays" in text
    assert "params/norm: checkpoint float32[5], this run float32[6]" in text
    assert "params/scale: checkpoint bfloat16[16], this run float32[16]" in text
    assert "key: checkpoint uint32[2], this run absent" in text
    assert counted.calls == []


def test_only_what_a_process_needs_is_fetched(tmp_path):
    """A leaf on one device of a mesh of two: the other half stays where it is."""
    two, one = make_mesh(fsdp=2), make_mesh(jax.devices()[3:4])
    choice = snapshot(tmp_path, make_state(two, seed=4), 1)
    half = jax.ShapeDtypeStruct((16, 32), "float32", sharding=NamedSharding(one, P()))
    shards = tuple(s for s in choice.shards if s.path == "params/embed")
    only = type(choice)(choice.step, 1, "job", {}, {"params/embed": choice.arrays["params/embed"]}, shards)
    counted = Counted()
    assemble({"params": {"embed": half}}, only, counted)
    assert len(counted.calls) == 2
    with pytest.raises(NoGoodCopy, match=r"params/embed \[0:16, 16:32\] of step 1 is in no slot"):
        assemble({"params": {"embed": half}}, type(only)(1, 1, "job", {}, only.arrays, shards[:1]), counted)


def test_a_fetch_never_raises_slot_error_for_good_files(tmp_path):
    choice = snapshot(tmp_path, make_state(make_mesh(fsdp=2), seed=4), 1)
    with pytest.raises(SlotError, match="is not there"):
        slot.read_shard(tmp_path / "none", choice.shards[0].at(choice.shards[0].locations[0]), "float32")
