"""The memory tier of one worker: what may be overwritten, what is copied, and what happens when things go wrong."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from states import SHAPES, SPECS, make_abstract, make_mesh, make_record, make_state, make_values, same_bits

from jaxscale import tree
from jaxscale.checkpoint import slot
from jaxscale.checkpoint.assemble import assemble
from jaxscale.checkpoint.cover import Copy, choose
from jaxscale.checkpoint.memory import MemorySnapshots, free_generation, is_free
from jaxscale.checkpoint.slot import SlotError, SlotWriter

WAIT = 60


class Worker:
    """MemorySnapshots with a coordinator that says what the test wants."""

    def __init__(self, folder, epoch=1, committed=-1, decided=-1, **changes):
        self.folder, self.committed, self.decided = folder, committed, decided
        self.notices, self._arrived = [], threading.Condition()
        fields = {"job": "job", "host": "host-0", "rank": 0, "every": 1, "generations": 2, "final_seconds": 0.05}
        self.snapshots = MemorySnapshots(
            folder,
            epoch=epoch,
            verdicts=lambda: (self.committed, self.decided),
            notify=self.notify,
            **fields | changes,
        )

    def notify(self, kind, fields):
        with self._arrived:
            self.notices.append((kind, fields))
            self._arrived.notify_all()

    def offer(self, step, state=None, final=False):
        """Offers a step, and waits for the notice of what became of it."""
        count = len(self.notices)
        self.snapshots.offer(step, state or small_state(step), make_record(step), final=final)
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.notices) > count, WAIT)
        self.snapshots._wait()
        return self.notices[-1]

    def held(self):
        found = {}
        for file in sorted(self.folder.iterdir()):
            try:
                table = slot.verify(file, "job")
            except SlotError:
                found[file.name] = None
            else:
                found[file.name] = (table.step, table.epoch)
        return found


def small_state(step):
    return {"x": jax.device_put(np.full(3, step, np.float32), jax.devices()[0])}


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path / "own")
    yield worker
    worker.snapshots.close()


def test_wants_every_k_steps(tmp_path):
    wants = Worker(tmp_path, every=3).snapshots.wants
    assert [step for step in range(1, 10) if wants(step)] == [3, 6, 9]
    assert not any(map(Worker(tmp_path, every=0).snapshots.wants, range(10)))
    assert list(tmp_path.iterdir()) == [], "nothing is touched before the first offer"


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}, {}])
def test_a_slot_holds_each_part_once_and_all_of_it(worker, sizes):
    mesh = make_mesh(**sizes)
    kind, fields = worker.offer(1, make_state(mesh, seed=1))
    assert kind == "slot_sealed"
    table = slot.verify(worker.folder / fields["file"], "job")
    total = sum(array.nbytes for array in make_values(1).values())
    assert fields["bytes"] == table.nbytes == total, "replicas are not kept"
    assert (table.step, table.epoch, table.host, table.rank) == (1, 1, "host-0", 0)
    assert {path: (info.shape, info.dtype) for path, info in table.arrays.items()} == SHAPES
    assert table.record["row"] == 8
    assert table.record["metrics_line"]["grad_norm"] == float("inf")
    assert fields["seconds"] >= fields["blocked_seconds"] > 0
    choice = choose([Copy("host-0", str(worker.folder / fields["file"]), table)], [])
    state = assemble(make_abstract(mesh), choice, read(table))
    assert same_bits(state, seed=1) == []


def read(table):
    return lambda location, source: slot.read_shard(
        Path(location.file), source.at(location), table.arrays[source.path].dtype
    )


def test_a_state_may_be_donated_right_after_offer_and_is_donated_in_place(worker):
    mesh = make_mesh(fsdp=4)
    negate = jax.jit(lambda s: jax.tree.map(jax.lax.neg, s), donate_argnums=0)
    state = make_state(mesh, seed=3)
    with jax.set_mesh(mesh):
        state = negate(negate(state))
        places = [s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(state) for s in x.addressable_shards]
        worker.snapshots.offer(1, state, make_record(1))
        state = jax.block_until_ready(negate(state))
    worker.snapshots._wait()
    after = [s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(state) for s in x.addressable_shards]
    assert after == places, "a view of the state that lives on makes the step allocate and copy"
    table = slot.verify(worker.folder / "gen-0", "job")
    choice = choose([Copy("host-0", str(worker.folder / "gen-0"), table)], [])
    assert same_bits(assemble(make_abstract(mesh), choice, read(table)), seed=3) == []


def test_a_sealed_slot_stays_until_its_step_is_decided(worker):
    assert worker.offer(1)[0] == "slot_sealed"
    assert worker.offer(2)[0] == "slot_sealed"
    kind, fields = worker.offer(3)
    assert (kind, fields["step"]) == ("slot_skipped", 3)
    assert "gen-0 holds step 1, gen-1 holds step 2" in fields["reason"]
    assert worker.held() == {"gen-0": (1, 1), "gen-1": (2, 1)}
    worker.committed, worker.decided = 1, 1
    assert worker.offer(3)[0] == "slot_skipped", "step 1 is the newest committed, step 2 is undecided"
    worker.decided = 2
    assert worker.offer(4)[0] == "slot_sealed", "step 2 was dropped"
    assert worker.held() == {"gen-0": (1, 1), "gen-1": (4, 1)}
    worker.committed, worker.decided = 4, 4
    worker.offer(5)
    assert worker.held() == {"gen-0": (5, 1), "gen-1": (4, 1)}


def test_memory_is_allocated_at_the_first_offer_and_never_again(worker, monkeypatch):
    made = []
    make = SlotWriter.__init__

    def counted(self, path, *rest):
        made.append(path.name)
        make(self, path, *rest)

    monkeypatch.setattr(SlotWriter, "__init__", counted)
    counts = []
    for step in range(1, 6):
        assert worker.offer(step)[0] == "slot_sealed"
        worker.committed = worker.decided = step
        counts.append(len(made))
    assert counts == [2] * 5
    assert made == ["gen-0", "gen-1"]


def test_a_new_epoch_keeps_what_it_was_restored_from(tmp_path):
    first = Worker(tmp_path)
    for step in (4, 5):
        first.offer(step)
    first.snapshots.close()
    second = Worker(tmp_path, epoch=2, committed=4, decided=4)
    second.offer(5)
    assert second.held() == {"gen-0": (4, 1), "gen-1": (5, 2)}
    assert second.offer(6)[0] == "slot_skipped"
    second.committed = second.decided = 5
    second.offer(6)
    assert second.held() == {"gen-0": (6, 2), "gen-1": (5, 2)}
    second.snapshots.close()
    fenced = Worker(tmp_path, epoch=1, committed=5, decided=9)
    assert fenced.offer(10)[0] == "slot_skipped", "an old epoch's worker overwrites nothing of a newer one"
    fenced.snapshots.close()


def test_another_layout_in_a_new_epoch(tmp_path):
    first = Worker(tmp_path)
    for step in (4, 5):
        first.offer(step)
    first.snapshots.close()
    second = Worker(tmp_path, epoch=2, committed=4, decided=4)
    mesh = make_mesh(fsdp=8)
    second.offer(6, make_state(mesh))
    assert second.held() == {"gen-0": (4, 1), "gen-1": (6, 2)}, "resizing must not touch the promised slot"
    second.committed = second.decided = 6
    second.offer(7, make_state(mesh))
    assert second.held() == {"gen-0": (7, 2), "gen-1": (6, 2)}
    second.snapshots.close()


def test_a_slot_of_another_job_or_a_damaged_one_is_no_promise(tmp_path):
    other = Worker(tmp_path, job="other")
    other.offer(1)
    other.snapshots.close()
    (tmp_path / "gen-1").write_bytes(b"x" * 10_000)
    worker = Worker(tmp_path)
    worker.offer(1)
    worker.offer(2)
    assert worker.held() == {"gen-0": (1, 1), "gen-1": (2, 1)}
    worker.snapshots.close()


def test_a_step_is_skipped_while_the_one_before_is_being_sealed(worker, monkeypatch):
    release = threading.Event()
    seal = SlotWriter.seal
    monkeypatch.setattr(SlotWriter, "seal", lambda self, record: (release.wait(WAIT), seal(self, record))[1])
    worker.snapshots.offer(1, small_state(1), make_record(1))
    worker.snapshots.offer(2, small_state(2), make_record(2))
    assert worker.notices == [], "reports come in the order of steps: the one before has not been told yet"
    threading.Timer(0.1, release.set).start()
    assert worker.offer(3, final=True)[0] == "slot_sealed", "final waits for it, and seals its own step"
    assert [(kind, fields["step"]) for kind, fields in worker.notices[:2]] == [("slot_sealed", 1), ("slot_skipped", 2)]
    assert worker.held() == {"gen-0": (1, 1), "gen-1": (3, 1)}


def test_final_is_sealed_when_it_returns_and_waits_for_a_verdict(tmp_path):
    worker = Worker(tmp_path, every=0, final_seconds=WAIT)
    for step in (1, 2):
        worker.snapshots.offer(step, small_state(step), make_record(step))
        assert list(tmp_path.iterdir()) == [], "not due"
    for step in (1, 2):
        worker.snapshots.offer(step, small_state(step), make_record(step), final=True)
        assert worker.held()[f"gen-{step - 1}"] == (step, 1)
    worker.snapshots.offer(2, small_state(2), make_record(2), final=True)
    assert len(worker.notices) == 2, "a step that is sealed already is safe"

    def decide():
        worker.committed = worker.decided = 2

    timer = threading.Timer(0.1, decide)
    timer.start()
    worker.snapshots.offer(3, small_state(3), make_record(3), final=True)
    assert worker.held() == {"gen-0": (3, 1), "gen-1": (2, 1)}
    worker.snapshots.close()
    timer.join()


def test_final_without_a_verdict_says_what_it_waited_for(worker):
    worker.offer(1)
    worker.offer(2)
    with pytest.raises(SlotError, match=r"the last state, of step 3, found no slot within 0.05 s: gen-0 holds step 1"):
        worker.snapshots.offer(3, small_state(3), make_record(3), final=True)
    assert worker.held() == {"gen-0": (1, 1), "gen-1": (2, 1)}


def test_a_committed_step_is_not_written_again(tmp_path):
    worker = Worker(tmp_path, committed=7, decided=7)
    worker.snapshots.offer(7, small_state(7), make_record(7), final=True)
    assert worker.notices == []
    assert worker.held() == {}


def test_an_error_of_the_thread_is_raised_by_the_next_call_once(worker, monkeypatch):
    def fail(*_):
        raise SlotError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(SlotWriter, "seal", fail)
        worker.snapshots.offer(1, small_state(1), make_record(1))
        worker.snapshots._wait()
    with pytest.raises(SlotError, match="no room"):
        worker.snapshots.offer(2, small_state(2), make_record(2))
    assert worker.offer(3)[0] == "slot_sealed"
    assert worker.held()["gen-0"] == (3, 1), "the slot that failed is void and used first"
    worker.offer(4)
    worker.committed = worker.decided = 4
    with monkeypatch.context() as patch:
        patch.setattr(SlotWriter, "seal", fail)
        worker.snapshots.offer(5, small_state(5), make_record(5))
        worker.snapshots._wait()
    with pytest.raises(SlotError, match="no room"):
        worker.snapshots.offer(6, small_state(6), make_record(6))
    worker.committed, worker.decided = 3, 4
    worker.offer(7)
    assert worker.held() == {"gen-0": (7, 1), "gen-1": (4, 1)}, "what gen-0 held before is no promise any more"
    with monkeypatch.context() as patch:
        patch.setattr(SlotWriter, "seal", fail)
        worker.committed = worker.decided = 7
        worker.snapshots.offer(8, small_state(8), make_record(8))
        with pytest.raises(SlotError, match="no room"):
            worker.snapshots.close()


def test_wrong_calls(worker):
    with pytest.raises(ValueError, match="the record of step 2 was offered with the state of step 1"):
        worker.snapshots.offer(1, small_state(1), make_record(2))
    with pytest.raises(TypeError, match="x/y of the state is a int"):
        worker.snapshots.offer(1, {"x": {"y": 3}}, make_record(1))


def test_no_memory_is_told_by_offer(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    worker = Worker(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(SlotError, match="no room for the memory slot"):
            worker.snapshots.offer(1, small_state(1), make_record(1))
    assert worker.offer(2)[0] == "slot_sealed", "once there is room it goes on"
    worker.snapshots.close()


slots = st.none() | st.tuples(st.integers(0, 6), st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@example([(4, 1), (4, 2)], 3, 4, 0)
@given(st.lists(slots, min_size=2, max_size=3), st.integers(1, 3), st.integers(-1, 6), st.integers(0, 3))
def test_the_retention_rule(held, epoch, committed, undecided):
    decided = committed + undecided
    for generation, found in enumerate(held):
        free = is_free(held, generation, epoch, committed, decided)
        if found is None:
            assert free
        elif found[1] > epoch or (found[1] == epoch and found[0] > decided):
            assert not free, "a promise"
    kept = [h for i, h in enumerate(held) if not is_free(held, i, epoch, committed, decided)]
    newest = [h for h in held if h is not None and h[0] == committed]
    assert not newest or max(newest) in kept
    chosen = free_generation(held, epoch, committed, decided)
    assert (chosen is None) == (len(kept) == len(held))
    if all(h is None or (h[1] <= epoch and h[0] <= decided) for h in held) and len({*held}) == len(held):
        assert chosen is not None, "two generations are enough once all is decided"


SCRIPT = """
import os, signal, sys
from pathlib import Path
folder, tests, *points = sys.argv[1:]
sys.path.insert(0, tests)
import jax
jax.config.update("jax_num_cpu_devices", 2)
from states import make_mesh, make_record, make_state
from jaxscale.checkpoint.memory import MemorySnapshots
from jaxscale.checkpoint.slot import SlotWriter

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def work(point):
    mesh = make_mesh(fsdp=2)
    snapshots = MemorySnapshots(Path(folder) / point, job="job", host="host-0", rank=0, epoch=1, every=1, generations=2,
                                verdicts=lambda: (1, 2), notify=lambda *_: None)
    for step in (2, 3, 4):
        if step == 4:
            if point == "begin": SlotWriter.begin = die
            if point == "copy":
                view = SlotWriter.view
                SlotWriter.view = lambda self, index: die() if index == 5 else view(self, index)
            if point == "seal": SlotWriter.seal = die
            if point == "header": SlotWriter._write_header = die
        snapshots.offer(step, make_state(mesh, seed=step), make_record(step), final=True)
    die()

for point in points:
    child = os.fork()  # no backend yet, so this is safe; importing JAX once is what takes time
    if child == 0:
        try:
            work(point)
        finally:
            os._exit(1)
    print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
POINTS = ["begin", "copy", "seal", "header", "end"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, Path(__file__).parent, *POINTS],
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.split() == [word for point in POINTS for word in (point, "-9")], ended.stderr
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_other_generation_is_whole(killed, point):
    """Steps 2 and 3 lie in the two generations; step 4 goes over step 2, which was dropped."""
    copies = []
    for file in sorted((killed / point).iterdir()):
        try:
            copies.append(Copy("host-0", str(file), slot.verify(file, "job")))
        except SlotError:
            continue
    choice = choose(copies, [(1, 0)])
    assert choice.step == (4 if point == "end" else 3)
    assert {copy.table.step for copy in copies} == {"end": {3, 4}, "begin": {2, 3}}.get(point, {3})
    mesh = make_mesh(fsdp=4)
    state = assemble(make_abstract(mesh), choice, read(copies[0].table))
    assert same_bits(state, seed=choice.step) == []
    assert set(tree.flatten(state)) == set(SPECS)
