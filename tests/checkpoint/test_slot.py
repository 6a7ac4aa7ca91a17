"""Memory slots: what is written comes back bit for bit, and whatever is not wholly that is refused with its reason."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.checkpoint import slot, slot_format
from jaxscale.checkpoint.slot import HEADER_BYTES, ArrayInfo, SlotError, SlotWriter

JOB = "5f3a" * 8
ARRAYS = {
    "params/w": ArrayInfo((8, 6), "float32"),
    "params/b": ArrayInfo((5,), "bfloat16"),
    "key": ArrayInfo((2,), "uint32"),
    "skipped": ArrayInfo((), "int32"),
    "empty": ArrayInfo((0, 3), "float32"),
    "elsewhere": ArrayInfo((1 << 20, 1 << 20), "int8"),
}
SHARDS = [
    ("params/w", ((4, 8), (0, 6))),
    ("params/b", ((0, 5),)),
    ("key", ((0, 2),)),
    ("skipped", ()),
    ("empty", ((0, 0), (0, 3))),
    ("params/w", ((0, 4), (0, 3))),
]
RECORD = {"step": 7, "metrics_line": {"loss": math.nan, "grad_norm": -math.inf, "step": 7}, "best": {}, "row": 56}


def writer_at(path, arrays=ARRAYS, shards=SHARDS, job=JOB):
    return SlotWriter(path, job, "host-0", 3, arrays, shards)


def fill(writer, seed):
    random = np.random.default_rng(seed)
    for index, shard in enumerate(writer.shards):
        writer.view(index).reshape(-1).view(np.uint8)[:] = np.frombuffer(random.bytes(shard.nbytes), np.uint8)


def seal(writer, epoch, step, record=RECORD):
    writer.begin(epoch, step)
    fill(writer, step)
    return writer.seal(record)


def contents(path, table):
    with slot.open_shards(path, table) as shards:
        return [shards.read(shard).tobytes() for shard in table.shards]


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "gen-0"
    writer = writer_at(path)
    table = seal(writer, 2, 7)
    writer.close()
    return path, table


def refused(path, match, job=JOB):
    with pytest.raises(SlotError, match=match) as caught:
        slot.read_slot(path, job)
    assert str(path) in str(caught.value)


def test_what_is_written_comes_back_bit_for_bit(sealed):
    path, table = sealed
    found = slot.read_slot(path, JOB)
    assert found.shards == slot.verify(path, JOB).shards
    assert (found.job, found.epoch, found.step, found.host, found.rank) == (JOB, 2, 7, "host-0", 3)
    assert found.arrays == ARRAYS
    assert found.shards == table.shards
    assert math.isnan(found.record["metrics_line"]["loss"])
    assert found.record["metrics_line"]["grad_norm"] == -math.inf
    assert found.record["row"] == 56
    random = np.random.default_rng(7)
    with slot.open_shards(path, found) as shards:
        for shard, (name, box) in zip(found.shards, SHARDS, strict=True):
            array = shards.read(shard)
            assert (shard.path, shard.box) == (name, box)
            assert array.shape == tuple(stop - start for start, stop in box)
            assert array.dtype == np.dtype(getattr(ml_dtypes, ARRAYS[name].dtype, ARRAYS[name].dtype))
            assert array.tobytes() == random.bytes(shard.nbytes)
            assert shard.offset % 64 == 0


def test_what_was_read_is_a_copy(sealed):
    path, table = sealed
    with slot.open_shards(path, table) as shards:
        array = shards.read(table.shards[0])
    before = array.tobytes()
    writer = writer_at(path)
    seal(writer, 2, 8)
    writer.close()
    assert array.tobytes() == before
    array[:] = 0
    slot.verify(path, JOB)


def test_begin_makes_the_slot_void_and_a_new_writer_does_not(sealed):
    path, table = sealed
    before = os.stat(path)
    writer = writer_at(path)
    assert slot.verify(path, JOB).shards == table.shards
    assert os.stat(path).st_ino == before.st_ino
    writer.begin(2, 8)
    refused(path, "is being written")
    fill(writer, 8)
    refused(path, "is being written")
    writer.seal(RECORD | {"step": 8})
    assert slot.verify(path, JOB).step == 8
    writer.close()


def test_an_old_table_does_not_vouch_for_new_data(sealed):
    path, old = sealed
    writer = writer_at(path)
    seal(writer, 2, 8)
    writer.close()
    with (
        slot.open_shards(path, old) as shards,
        pytest.raises(SlotError, match=r"gen-0: params/w \[4:8, 0:6\] is damaged"),
    ):
        shards.read(old.shards[0])


def test_another_layout_resizes_the_file(tmp_path):
    path = tmp_path / "gen-0"
    for shards in (SHARDS, SHARDS[:1], [("elsewhere", ((0, 64), (0, 1 << 14)))], SHARDS):
        writer = writer_at(path, shards=shards)
        table = seal(writer, 1, 1)
        writer.close()
        assert slot.verify(path, JOB).shards == slot.read_slot(path, JOB).shards == table.shards
        assert [(s.path, s.box) for s in table.shards] == shards


def test_a_record_larger_than_its_room_makes_the_file_grow(tmp_path):
    path = tmp_path / "gen-0"
    writer = writer_at(path)
    for size in (10, 500_000, 10):
        seal(writer, 1, 1, {"text": "x" * size})
        assert len(slot.verify(path, JOB).record["text"]) == size
    writer.close()


def test_memory_is_allocated_at_once(tmp_path):
    writer = writer_at(tmp_path / "gen-0", shards=[("elsewhere", ((0, 64), (0, 1 << 14)))])
    writer.close()
    found = os.stat(tmp_path / "gen-0")
    assert found.st_blocks * 512 >= found.st_size >= 1 << 20


@pytest.fixture
def tiny_memory(tmp_path):
    folder = tmp_path / "shm"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_too_little_room_is_one_clear_error(tiny_memory):
    path = tiny_memory / "gen-0"
    with pytest.raises(SlotError, match=r"no room for the memory slot .*gen-0: it needs 21\d+ bytes .* 1048576 of"):
        writer_at(path, shards=[("elsewhere", ((0, 2), (0, 1 << 20)))])
    assert os.stat(path).st_size == 0, "what was allocated in vain is given back"
    writer = writer_at(path)
    writer.begin(1, 1)
    with pytest.raises(SlotError, match="no room for the memory slot"):
        writer.seal({"text": "x" * (1 << 20)})
    refused(path, "is being written")
    table = seal(writer, 1, 2)
    writer.close()
    assert contents(path, table) == contents_of(table)


def test_a_shard_outside_its_array_and_a_job_id_that_does_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lies in no array"):
        writer_at(tmp_path / "gen-0", shards=[("key", ((1, 3),))])
    with pytest.raises(ValueError, match="lies in no array"):
        writer_at(tmp_path / "gen-0", shards=[("nothing", ())])
    with pytest.raises(SlotError, match="must be 1 to 64 bytes"):
        writer_at(tmp_path / "gen-0", job="x" * 65)


def test_a_record_that_json_cannot_hold_leaves_the_slot_void(tmp_path):
    writer = writer_at(tmp_path / "gen-0")
    writer.begin(1, 1)
    with pytest.raises(TypeError):
        writer.seal({"what": {1, 2}})
    refused(tmp_path / "gen-0", "is being written")
    writer.close()


def test_seal_needs_begin(tmp_path):
    writer = writer_at(tmp_path / "gen-0")
    with pytest.raises(RuntimeError, match="without begin"):
        writer.seal(RECORD)
    writer.close()


def test_files_that_are_no_slot_of_this_job(tmp_path, sealed):
    path, _ = sealed
    refused(tmp_path / "nothing", "is not there")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "is empty")
    (tmp_path / "short").write_bytes(b"x" * 100)
    refused(tmp_path / "short", "is cut short: it has 100 bytes")
    (tmp_path / "zeros").write_bytes(bytes(8192))
    refused(tmp_path / "zeros", "holds nothing yet")
    (tmp_path / "foreign").write_bytes(b"\x7fELF" * 4096)
    refused(tmp_path / "foreign", "is not a memory slot")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")
    refused(tmp_path, "is not a regular file")
    refused(path, f"belongs to job {JOB}, not to other", job="other")
    data = bytearray(path.read_bytes())
    data[16] += 1
    (tmp_path / "version").write_bytes(data)
    refused(tmp_path / "version", "has slot format 2, this version of jaxscale reads 1")
    (tmp_path / "longer").write_bytes(path.read_bytes() + b"x")
    refused(tmp_path / "longer", "is too long")


def is_exact(path, table):
    """Whether a reader gets exactly what was written; False where it is refused. Anything else fails the test."""
    try:
        found = slot.read_slot(path, JOB)
        assert found == table
        return contents(path, found) == contents_of(table)
    except SlotError:
        with pytest.raises(SlotError):
            slot.verify(path, JOB)
        return False


def contents_of(table):
    random = np.random.default_rng(table.step)
    return [random.bytes(shard.nbytes) for shard in table.shards]


HEADER_USED = 160
SIMPLE = {"step": 7}  # a NaN is not equal to itself


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("slot") / "gen-0"
    writer = writer_at(path)
    table = seal(writer, 2, 7, SIMPLE)
    writer.close()
    assert is_exact(path, table)
    return path.read_bytes(), table, path.with_name("damaged")


def used_bytes(data, table):
    """Offsets that matter: the header's fields, the shards, the table."""
    end = max(s.offset + s.nbytes for s in table.shards)
    table_offset = -(-end // 64) * 64
    length = data.index(b"\0", table_offset) - table_offset
    spans = [(0, HEADER_USED), (table_offset, table_offset + length)]
    return spans + [(s.offset, s.offset + s.nbytes) for s in table.shards]


def test_every_flipped_bit_is_found(small):
    data, table, path = small
    path.write_bytes(data)
    with open(path, "r+b", buffering=0) as file:
        for start, stop in used_bytes(data, table):
            for offset in range(start, stop):
                bits = range(8) if offset < HEADER_USED else [offset % 8]
                for bit in bits:
                    os.pwrite(file.fileno(), bytes([data[offset] ^ 1 << bit]), offset)
                    with pytest.raises(SlotError):
                        slot.verify(path, JOB)
                os.pwrite(file.fileno(), data[offset : offset + 1], offset)
    assert is_exact(path, table)


def test_every_truncation_is_found(small):
    data, table, path = small
    for size in [*range(0, len(data), 997), *range(HEADER_BYTES - 2, HEADER_BYTES + 300), len(data) - 1]:
        path.write_bytes(data[:size])
        assert not is_exact(path, table)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_regions_are_refused_or_harmless(small, draw):
    data, table, path = small
    start = draw.draw(st.integers(0, len(data) - 1) | st.sampled_from([s for s, _ in used_bytes(data, table)]))
    patch = draw.draw(st.binary(min_size=1, max_size=300) | st.integers(1, 5000).map(bytes))
    path.write_bytes((data[:start] + patch + data[start + len(patch) :])[: len(data)])
    exact = is_exact(path, table)
    changed = path.read_bytes()
    matters = any(data[a:b] != changed[a:b] for a, b in used_bytes(data, table))
    assert exact == (not matters)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2 * HEADER_BYTES))
def test_random_bytes_are_refused(small, text, size):
    path = small[2]
    path.write_bytes((text * (size // max(1, len(text)) + 1))[:size])
    with pytest.raises(SlotError):
        slot.read_slot(path, JOB)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_table_with_right_digests_and_wrong_content_is_refused_or_makes_sense(small, draw):
    """What only a faulty or hostile writer produces: one value somewhere in the table is replaced by any other."""
    data, table, path = small
    value = slot_format.table_to_json(table)
    node, keys = value, list(value)
    while True:
        key = draw.draw(st.sampled_from(keys))
        if isinstance(node[key], dict | list) and node[key] and draw.draw(st.integers(0, 3)):
            node = node[key]
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        else:
            break
    node[key] = draw.draw(json_values)
    write_table(path, data, json.dumps(value).encode())
    try:
        found = slot.read_slot(path, JOB)
    except SlotError:
        return
    for shard in found.shards:
        assert shard.nbytes >= 0
        assert HEADER_BYTES <= shard.offset <= shard.offset + shard.nbytes <= len(data)
    with slot.open_shards(path, found) as shards:
        for shard in found.shards:
            try:
                array = shards.read(shard)
            except SlotError:
                continue
            assert array.nbytes == shard.nbytes


def write_table(path, data, text):
    """The slot of `data` with another table, and all digests as they should be."""
    header = slot_format.decode_header(data[:HEADER_BYTES], path, JOB, len(data))
    offset = header.table_offset
    header = slot_format.Header(JOB, 2, 7, len(data), offset, len(text), xxhash.xxh3_128(text).digest())
    path.write_bytes(slot_format.encode_header(header) + data[HEADER_BYTES:offset] + text.ljust(len(data) - offset))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t["shards"][0].__setitem__(2, -64), "lies at -64"),
        (lambda t: t["shards"][0].__setitem__(2, 0), "outside of the data"),
        (lambda t: t["shards"][0].__setitem__(2, 1 << 40), "outside of the data"),
        (lambda t: t["shards"][0].__setitem__(2, 4097), "lies at 4097"),
        (lambda t: t["shards"][1].__setitem__(2, t["shards"][0][2]), "overlaps the shard before it"),
        (lambda t: t["shards"][0].__setitem__(3, 95), "float32 needs 96"),
        (lambda t: t["shards"][0].__setitem__(1, [[4, 9], [0, 6]]), r"outside of the array's shape \[8, 6\]"),
        (lambda t: t["shards"][0].__setitem__(1, [[8, 4], [0, 6]]), "outside of the array's shape"),
        (lambda t: t["shards"][0].__setitem__(0, "params/none"), "no array of the state"),
        (lambda t: t["shards"][0].__setitem__(4, "ff"), "has the digest 'ff'"),
        (lambda t: t["arrays"]["key"].__setitem__(1, "object"), "no dtype"),
        (lambda t: t["arrays"]["key"].__setitem__(1, "datetime64[s]"), "no dtype"),
        (lambda t: t["arrays"]["key"].__setitem__(0, [1 << 61, 1 << 61]), "absurd shape"),
        (lambda t: t["arrays"]["key"].__setitem__(0, [True]), r"where \[shape, dtype\] belongs"),
        (lambda t: t.__setitem__("rank", -1), "cannot all be true"),
        (lambda t: t.__setitem__("step", 8), "different snapshots"),
        (lambda t: t.pop("record"), "'record' is a NoneType"),
        (lambda t: t["record"].__setitem__("nonfinite", {"step": {"x": "nan"}}), "record cannot be read"),
    ],
)
def test_each_kind_of_nonsense_in_a_table_has_its_reason(small, change, match):
    data, table, path = small
    value = slot_format.table_to_json(table)
    change(value)
    write_table(path, data, json.dumps(value).encode())
    refused(path, match)


def test_a_table_that_is_not_json(small):
    data, _, path = small
    for text, match in [(b"{", "not JSON"), (b"\xff", "not JSON"), (b"[" * 5000, "not JSON"), (b"3", "is an object")]:
        write_table(path, data, text)
        refused(path, match)


def test_a_state_that_is_neither_is_refused_even_with_a_right_digest(small):
    data, _, path = small
    fields = data[:20] + (3).to_bytes(4, "little") + data[24:144]
    path.write_bytes(fields + xxhash.xxh3_128(fields).digest() + data[HEADER_USED:])
    refused(path, "torn or damaged header")


def test_locate_says_where_the_bytes_lie(sealed):
    path, table = sealed
    shard = slot.locate(table, "params/b", ((0, 5),))
    with slot.open_shards(path, table) as shards:
        raw = os.pread(shards.descriptor, shard.nbytes, shard.offset)
        assert slot.check_shard(raw, shard, "bfloat16", "host-1").tobytes() == shards.read(shard).tobytes()
    with pytest.raises(SlotError, match="does not hold params/b"):
        slot.locate(table, "params/b", ((0, 4),))
    with pytest.raises(SlotError, match=r"host-1: params/b \[0:5\] is damaged"):
        slot.check_shard(bytes(10), shard, "bfloat16", "host-1")
    with pytest.raises(SlotError, match="came with 9 bytes, and has 10"):
        slot.check_shard(raw[:9], shard, "bfloat16", "host-1")


def receive(source, path, cut=None, flip=None):
    data = bytearray(source.read_bytes())
    if flip is not None:
        data[flip] ^= 4
    file = slot.begin_copy(path, len(data))
    os.pwrite(file, data[HEADER_BYTES:cut], HEADER_BYTES)
    os.close(file)
    return bytes(data[:HEADER_BYTES])


def test_a_copy_is_void_until_all_of_it_was_verified(tmp_path, sealed):
    source, table = sealed
    path = tmp_path / "copy"
    header = receive(source, path)
    refused(path, "holds nothing yet")
    adopted = slot.adopt(path, header, JOB)
    assert adopted.shards == table.shards
    assert contents(path, slot.read_slot(path, JOB)) == contents_of(table)
    os.close(slot.begin_copy(path, len(source.read_bytes())))
    refused(path, "holds nothing yet")
    shard = table.shards[0]
    for cut, flip in [
        (shard.offset + 5, None),
        (None, shard.offset + 5),
        (None, 30),
        (None, source.read_bytes().index(b'"host"')),
    ]:
        path.unlink()  # its bytes of before are the right ones
        header = receive(source, path, cut, flip)
        with pytest.raises(SlotError):
            slot.adopt(path, header, JOB)
        refused(path, "holds nothing yet")
    with pytest.raises(SlotError, match="belongs to job"):
        slot.adopt(path, receive(source, path), "other")
    with pytest.raises(SlotError, match="a header of 5 bytes"):
        slot.adopt(path, header[:5], JOB)
    with pytest.raises(SlotError, match="a slot of 100 bytes cannot be"):
        slot.begin_copy(path, 100)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from jaxscale.checkpoint.boxes import whole
from jaxscale.checkpoint.slot import ArrayInfo, SlotWriter

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def halfway(name):
    method = getattr(SlotWriter, name)
    def half(self, data):
        setattr(SlotWriter, name, lambda self, part: None)
        if name == "_write_table": os.pwrite(self._file, data[: len(data) // 2], self._data_end)
        else: self._bytes[:60] = np.frombuffer(data[:60], np.uint8)
        die()
    return half

path, point, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
arrays = {"a": ArrayInfo((size,), "float32"), "b": ArrayInfo((), "int32")}
if point == "allocate": os.posix_fallocate = die
writer = SlotWriter(path, "job", "host-0", 0, arrays, [(name, whole(i.shape)) for name, i in arrays.items()])
for step in (1, 2):
    if step == 2:
        if point == "begin": SlotWriter._put_state = die
        if point == "digest": SlotWriter._digest = die
        if point == "table": SlotWriter._write_table = die
        if point == "half the table": SlotWriter._write_table = halfway("_write_table")
        if point == "header": SlotWriter._write_header = die
        if point == "half the header": SlotWriter._write_header = halfway("_write_header")
    writer.begin(1, step)
    if step == 2 and point == "state":
        SlotWriter._put_state = die
    writer.view(0)[:size // 2] = step
    if step == 2 and point == "copy": die()
    writer.view(0)[:] = step
    writer.view(1)[...] = step
    writer.seal({"step": step})
die()
"""


@pytest.mark.parametrize(
    ("point", "step"),
    [
        ("allocate", None),
        ("begin", 1),
        ("copy", None),
        ("digest", None),
        ("table", None),
        ("half the table", None),
        ("header", None),
        ("half the header", None),
        ("state", None),
        ("end", 2),
    ],
)
def test_killed_at_any_point_a_slot_is_whole_or_void(tmp_path, point, step):
    path = tmp_path / "gen-0"
    size = 100_000
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, path, point, str(size)],
        check=False,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == -9, ended.stderr
    try:
        table = slot.verify(path, "job")
    except SlotError:
        assert step is None
        return
    assert table.step == step
    assert table.record == {"step": step}
    with slot.open_shards(path, table) as shards:
        assert np.array_equal(shards.read(table.shards[0]), np.full(size, step, np.float32))
        assert shards.read(table.shards[1]) == step
