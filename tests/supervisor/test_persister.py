"""The persister as a process: what it answers, its low priority, and what is told when it dies or is given up."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxscale.checkpoint.finalise import finalise
from jaxscale.checkpoint.layout import check_files
from jaxscale.checkpoint.room import Room, make_room
from jaxscale.checkpoint.slot import ArrayInfo, SlotWriter
from jaxscale.supervisor import persister
from jaxscale.supervisor.inventory import OWN
from jaxscale.supervisor.persister_keeper import PersisterKeeper
from jaxscale.supervisor.process_stat import living_stat_of

RECORD = {
    "step": 7,
    "row": 56,
    "config": {},
    "data": {},
    "environment": {},
    "metrics_line": {"step": 7},
    "best": {},
    "epoch": 2,
}
VALUES = np.arange(4096, dtype=np.float32)


@pytest.fixture(name="host")
def _host(tmp_path):
    """A host's folder with one sealed slot: step 7 of epoch 2."""
    folder = tmp_path / "host-0"
    (folder / OWN).mkdir(parents=True)
    box = ((0, 4096),)
    arrays = {"params/w": ArrayInfo((4096,), "float32")}
    writer = SlotWriter(folder / OWN / "gen-0", "job", "host-0", 0, arrays, [("params/w", box)])
    writer.begin(2, 7)
    writer.view(0)[...] = VALUES
    writer.seal(RECORD)
    writer.close()
    return folder


def made(path):
    """A folder of a step of epoch 2."""
    make_room(path, 2)
    return path


class Kept:
    """A keeper, and what it says."""

    def __init__(self, host):
        self.said = []
        self.keeper = PersisterKeeper(host, "job", lambda kind, **fields: self.said.append((kind, fields)))

    async def word(self, seconds=30):
        """The next word; None where none comes."""
        end = time.monotonic() + seconds
        while not self.said and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return self.said.pop(0) if self.said else None

    async def stopped_amid(self, target):
        """Pid of a persister that has written a part and is stopped now, with another order given to it."""
        self.keeper.order(2, 7, target)
        assert (await self.word())[0] == "persisted"
        os.kill(self.pid, signal.SIGSTOP)
        self.keeper.order(2, 7, target)
        return self.pid

    @property
    def pid(self):
        return self.keeper._process.pid


def kept(host, body):
    """Runs `body(Kept)` in a loop; the persister is gone afterwards."""

    async def run():
        one = Kept(host)
        try:
            await body(one)
        finally:
            process = one.keeper._process
            await one.keeper.close()
            assert process is None or living_stat_of(process.pid) is None

    said, before = [], sys.unraisablehook
    sys.unraisablehook = lambda what: said.append(str(what.exc_value))
    try:
        asyncio.run(run())
        gc.collect()
    finally:
        sys.unraisablehook = before
    assert said == [], "nothing is left for the end of the loop"


def test_its_part_becomes_a_step(host, tmp_path):
    async def body(one):
        one.keeper.order(2, 7, made(tmp_path / "steps" / "7"))
        kind, fields = await one.word()
        assert (kind, fields["epoch"], fields["step"], fields["bytes"]) == ("persisted", 2, 7, VALUES.nbytes)
        first = one.pid
        one.keeper.order(2, 7, made(tmp_path / "other" / "7"))
        assert (await one.word())[0] == "persisted"
        assert one.pid == first, "the same process for the next order"

    kept(host, body)
    finalise(tmp_path / "steps" / "7", 1, 2, {})
    assert check_files(tmp_path / "steps" / "7").step == 7


def test_what_it_cannot_write_it_says(host, tmp_path):
    async def body(one):
        one.keeper.order(2, 8, tmp_path / "8")
        kind, fields = await one.word()
        assert (kind, fields["reason"]) == (
            "unpersisted",
            "step 8 of epoch 2 is in no slot: gen-0 holds step 7 of epoch 2",
        )
        (tmp_path / "file").write_text("")
        one.keeper.order(2, 7, tmp_path / "file" / "7")
        kind, fields = await one.word()
        assert kind == "unpersisted"
        assert "Not a directory" in fields["reason"]
        one.keeper.order(2, 7, made(tmp_path / "7"))
        assert (await one.word())[0] == "persisted", "what failed leaves nothing behind"

    kept(host, body)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_its_death_is_said_and_the_next_order_gets_another(host, tmp_path, number):
    async def body(one):
        first = await one.stopped_amid(made(tmp_path / "7"))
        assert await one.word(0.3) is None
        os.kill(first, number)
        os.kill(first, signal.SIGCONT)
        kind, fields = await one.word()
        assert (kind, fields["step"]) == ("unpersisted", 7)
        assert fields["reason"] == "the persister ended; see the log of the host"
        one.keeper.order(2, 7, made(tmp_path / "7"))
        assert (await one.word())[0] == "persisted"
        assert one.pid != first

    kept(host, body)


def test_what_is_given_up_is_ended_at_once_and_says_nothing(host, tmp_path):
    async def body(one):
        first = await one.stopped_amid(made(tmp_path / "7"))
        await asyncio.sleep(0.1)
        one.keeper.stop()
        assert await one.word(0.5) is None
        assert living_stat_of(first) is None
        one.keeper.order(2, 7, made(tmp_path / "again"))
        assert (await one.word())[0] == "persisted"

    kept(host, body)


def test_it_works_behind_everything_else_and_ends_with_its_input(host, tmp_path):
    command = [sys.executable, "-m", "jaxscale.supervisor.persister"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        order = {"epoch": 2, "step": 7, "folder": str(host), "job": "job", "target": str(made(tmp_path / "7"))}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["bytes"] == VALUES.nbytes
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        os.kill(process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches the whole group
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        assert "bytes" in json.loads(process.stdout.readline())
        loaded = Path(f"/proc/{process.pid}/maps").read_text()
        assert "jaxlib" not in loaded
        process.stdin.close()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def policies():
    """How the threads of this process are scheduled."""
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}


def test_all_its_threads_are_hurried_when_an_order_has_waited_long(host, tmp_path, monkeypatch):
    """A thread goes on as the one that started it was scheduled."""
    amid, go, before = threading.Event(), threading.Event(), policies()
    place = Room.place

    def slow(self, name):
        amid.set()
        assert go.wait(30)
        return place(self, name)

    monkeypatch.setattr(Room, "place", slow)
    monkeypatch.setattr(persister, "IDLE_SECONDS", 1.0)
    order = {"epoch": 2, "step": 7, "folder": str(host), "job": "job", "target": str(made(tmp_path / "7"))}
    answers = []
    working = threading.Thread(target=lambda: answers.append(persister._obey(order)))
    try:
        working.start()
        assert amid.wait(30)
        assert os.SCHED_IDLE in policies()
        deadline = time.monotonic() + 30
        while os.SCHED_IDLE in policies() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert policies() == {os.SCHED_OTHER}
        go.set()
        working.join(30)
        assert answers[0]["bytes"] == VALUES.nbytes
    finally:
        go.set()
        working.join(30)
        persister._behind_everything(False)
    assert policies() == before
