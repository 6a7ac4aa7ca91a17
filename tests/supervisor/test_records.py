"""The two records in shared memory: whole at every look, also when their writer was killed amid a change."""

import contextlib
import multiprocessing
import os
import signal
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.supervisor import records
from jaxscale.supervisor.evidence import SECTIONS as TOLD
from jaxscale.supervisor.records import (
    HISTORY,
    PROGRESS_BYTES,
    SECTIONS,
    VERDICT_BYTES,
    ProgressRecord,
    TornRecord,
    VerdictRecord,
    Verdicts,
)


@pytest.fixture
def clock(monkeypatch):
    """Time that the test moves."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            pass

    clock = Clock()
    monkeypatch.setattr(records, "time", clock)
    return clock


@pytest.fixture
def pair(tmp_path):
    """The worker's and the agent's side of a progress record."""
    reader = ProgressRecord(tmp_path / "progress", create=True)
    writer = ProgressRecord(tmp_path / "progress")
    yield writer, reader
    writer.close()
    reader.close()


def test_the_reader_sees_what_the_writer_entered(pair, clock):
    writer, reader = pair
    writer.begin(3, 42, step=7)
    clock.now += 1.5
    writer.enter("compile", 7)
    clock.now += 2.0
    writer.enter("step", 8)
    seen = reader.read()
    assert (seen.epoch, seen.pid, seen.step, seen.section, seen.finished) == (3, 42, 8, "step", False)
    assert seen.entered == clock.now
    assert seen.ended == dict.fromkeys(SECTIONS, 0) | {"restore": 1, "compile": 1}
    assert (seen.durations["restore"], seen.durations["compile"], seen.durations["step"]) == ((1.5,), (2.0,), ())
    writer.finish()
    seen = reader.read()
    assert (seen.section, seen.step, seen.finished) == ("step", 8, True)


def test_a_new_worker_starts_afresh(pair, clock):
    writer, reader = pair
    writer.begin(1, 42)
    for step in range(5):
        clock.now += 1
        writer.enter("step", step)
    writer.finish()
    writer.begin(2, 43, step=4)
    seen = reader.read()
    assert (seen.epoch, seen.pid, seen.step, seen.section, seen.finished) == (2, 43, 4, "restore", False)
    assert set(seen.ended.values()) == {0}
    assert set(seen.durations.values()) == {()}


@pytest.mark.parametrize("count", [1, HISTORY - 1, HISTORY, HISTORY + 1, 3 * HISTORY + 5])
def test_the_last_durations_are_kept_oldest_first(pair, clock, count):
    writer, reader = pair
    writer.begin(1, 42)
    for number in range(count):
        writer.enter("step", number)
        clock.now += number + 1
        writer.enter("data", number)
    seen = reader.read()
    assert (seen.ended["step"], seen.ended["data"]) == (count, count - 1)
    assert list(seen.durations["step"]) == [number + 1 for number in range(count)][-HISTORY:]
    assert seen.durations["save"] == ()  # no section writes into another's place


def test_every_section_has_its_own_place(pair, clock):
    writer, reader = pair
    writer.begin(1, 42)
    for seconds, section in enumerate(SECTIONS, start=1):
        for _ in range(HISTORY + 1):
            writer.enter(section, 0)
            clock.now += seconds
    writer.enter("step", 0)
    seen = reader.read()
    for seconds, section in enumerate(SECTIONS, start=1):
        assert seen.durations[section][-1] == seconds
        assert len(seen.durations[section]) == HISTORY
    assert set(SECTIONS) < set(TOLD)


def test_an_untouched_record_is_no_worker(pair):
    _, reader = pair
    assert (reader.read().epoch, reader.read().pid) == (0, 0)


def test_verdicts(tmp_path):
    writer = VerdictRecord(tmp_path / "verdicts", create=True)
    reader = VerdictRecord(tmp_path / "verdicts")
    for verdicts in (Verdicts(-1, -1), Verdicts(10, 20), Verdicts(2**40, 2**40)):
        writer.write(verdicts)
        assert reader.read() == verdicts
    writer.close()
    reader.close()


def open_files():
    """Paths of what this process has open. Not their number: what earlier tests left is collected at any moment."""
    found = []
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{file}"))
    return found


@pytest.mark.parametrize("size", [0, 8, PROGRESS_BYTES - 1, PROGRESS_BYTES + 1, 1 << 16])
def test_a_file_of_another_size_is_no_record(tmp_path, size):
    path = tmp_path / "progress"
    path.write_bytes(bytes(size))
    with pytest.raises(TornRecord, match=f"{size} bytes, a record has {PROGRESS_BYTES}"):
        ProgressRecord(path)
    assert str(path) not in open_files(), "it was opened, and must be closed again"


def test_records_are_private(tmp_path):
    VerdictRecord(tmp_path / "verdicts", create=True).close()
    assert (tmp_path / "verdicts").stat().st_mode & 0o077 == 0


def test_a_record_is_kept_when_an_agent_opens_it_again(tmp_path):
    ProgressRecord(tmp_path / "progress", create=True).close()
    writer = ProgressRecord(tmp_path / "progress")
    writer.begin(5, 42)
    again = ProgressRecord(tmp_path / "progress", create=True)
    assert again.read().epoch == 5
    writer.close()
    again.close()


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=0, max_size=200), st.integers(0, PROGRESS_BYTES - 200), st.booleans())
def test_random_bytes_are_read_or_refused_and_nothing_else(tmp_path_factory, data, offset, even):
    path = tmp_path_factory.mktemp("record") / "progress"
    content = bytearray(PROGRESS_BYTES)
    content[offset : offset + len(data)] = data
    if even:
        content[0] &= 0xFE
    path.write_bytes(content)
    record = ProgressRecord(path)
    with contextlib.suppress(TornRecord):
        seen = record.read()
        assert seen.section in SECTIONS
        assert all(len(values) <= HISTORY for values in seen.durations.values())
    record.close()


def test_a_section_that_is_none_is_refused(tmp_path):
    content = bytearray(PROGRESS_BYTES)
    struct.pack_into("=I", content, 32, 77)  # after the sequence, epoch, pid and step
    (tmp_path / "progress").write_bytes(content)
    record = ProgressRecord(tmp_path / "progress")
    with pytest.raises(TornRecord, match="section 77"):
        record.read()
    record.close()


def die_amid_a_change(path):
    record = ProgressRecord(path)
    record.begin(1, os.getpid())

    def change(data):
        data[100:200] = b"x" * 100
        os.kill(os.getpid(), signal.SIGKILL)

    record._record.write(change)


def killed_writer(path):
    process = multiprocessing.get_context("spawn").Process(target=die_amid_a_change, args=(path,), daemon=True)
    process.start()
    try:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()
        process.join()


def test_a_record_whose_writer_was_killed_amid_a_change_is_torn_until_the_next_writer(tmp_path):
    path = tmp_path / "progress"
    reader = ProgressRecord(path, create=True)
    killed_writer(path)
    with pytest.raises(TornRecord, match="writer may have died"):
        reader.read()
    writer = ProgressRecord(path)
    writer.begin(2, 7)
    assert (reader.read().epoch, reader.read().pid) == (2, 7)
    writer.close()
    reader.close()


class InBetween:
    """A mapping in the middle of whose copying something happens, for the first few times."""

    def __init__(self, mapping, happens, times):
        self._mapping, self._happens, self._times = mapping, happens, times

    def __getitem__(self, key):
        if key != slice(None) or not self._times:
            return self._mapping[key]
        self._times -= 1
        half = self._mapping[:16]
        self._happens()
        return half + self._mapping[16:]

    def close(self):
        self._mapping.close()


@pytest.mark.parametrize("times", [1, 5])
def test_a_reader_looks_again_when_the_record_changed_meanwhile(tmp_path, times):
    """`committed` would be of one write and `decided` of the next."""
    writer = VerdictRecord(tmp_path / "verdicts", create=True)
    reader = VerdictRecord(tmp_path / "verdicts")
    steps = iter(range(1, 100))
    writer.write(Verdicts(0, 0))

    def happens():
        step = next(steps)
        writer.write(Verdicts(step, step))

    reader._record._map = InBetween(reader._record._map, happens, times)
    assert reader.read() == Verdicts(times, times)
    writer.close()
    reader.close()


def test_a_record_that_changes_at_every_look_is_given_up(tmp_path):
    writer = VerdictRecord(tmp_path / "verdicts", create=True)
    reader = VerdictRecord(tmp_path / "verdicts")
    reader._record._map = InBetween(reader._record._map, lambda: writer.write(Verdicts(1, 1)), 10**9)
    with pytest.raises(TornRecord, match="changed or was being written at every look"):
        reader.read()
    writer.close()
    reader.close()


def test_the_record_fits_its_file():
    assert records._history(len(SECTIONS)) <= PROGRESS_BYTES
    assert 8 + records._DECIDED.size <= VERDICT_BYTES
