"""What a coordinator does in the durable tier: one thing after the other, told each time, and never in its way."""

import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.locations import Locations
from jaxscale.checkpoint.manifest import DamagedCheckpoint
from jaxscale.checkpoint.owner import OWNER
from jaxscale.checkpoint.retention import Rules
from jaxscale.supervisor import storekeeper
from jaxscale.supervisor.facts import Store
from jaxscale.supervisor.storekeeper import Storekeeper


class Told:
    """What was told, by whom."""

    def __init__(self):
        self.words, self._more = [], threading.Condition()

    def __call__(self, what, reason, size):
        with self._more:
            self.words.append((what.what, what.step, reason, size, threading.current_thread().name))
            self._more.notify_all()

    def wait(self, count, seconds=30):
        with self._more:
            assert self._more.wait_for(lambda: len(self.words) >= count, seconds), self.words
        return [word[:4] for word in self.words]


def store(what, step, ranks=1):
    return Store(what, step, 1, ranks, {})


@pytest.fixture(name="told")
def _told():
    return Told()


@pytest.fixture(name="sealed")
def _sealed(monkeypatch):
    """Steps are made without parts; those of `fails` are not."""
    fails = {}

    def finalise(path, *_):
        if error := fails.get(int(path.name)):
            raise error
        (path / layout.MANIFEST).write_text("{}")
        (path / layout.COMMIT_FILE).write_text("yes")
        return 10

    monkeypatch.setattr(storekeeper, "finalise", finalise)
    return fails


def keeper(tmp_path, told, keep=2):
    return Storekeeper(tmp_path / "checkpoints", tmp_path / "metrics.jsonl", Rules(keep), told)


def test_nothing_is_touched_before_it_is_asked(tmp_path, told):
    keeper(tmp_path, told).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("sealed")
def test_steps_are_made_in_order_and_the_oldest_go(tmp_path, told):
    one = keeper(tmp_path, told)
    for step in (10, 20, 30):
        one.do(store("room", step))
        one.do(store("finalise", step))
    words = told.wait(6)
    assert words == [
        (what, step, "", 10 * (what == "finalise")) for step in (10, 20, 30) for what in ("room", "finalise")
    ]
    assert {word[4] for word in told.words} == {"store"}, "not in the coordinator's thread"
    end = time.monotonic() + 10
    while layout.numbered(tmp_path / "checkpoints") != [20, 30]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_came_to_nothing_is_swept_before_the_next(tmp_path, told, sealed):
    sealed[20] = DamagedCheckpoint("a part is missing")
    one = keeper(tmp_path, told)
    for step in (10, 20, 30):
        one.do(store("room", step))
        one.do(store("finalise", step))
    assert told.wait(6)[3] == ("finalise", 20, "a part is missing", 0)
    assert layout.list_steps(tmp_path / "checkpoints") == [10, 30] == layout.numbered(tmp_path / "checkpoints")


def test_storage_that_is_away_for_a_moment_is_waited_for(tmp_path, told, monkeypatch):
    answers = [OSError(5, "Input/output error"), OSError(110, "Connection timed out"), 7]

    def finalise(*_):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(storekeeper, "finalise", finalise)
    one = keeper(tmp_path, told)
    one.do(store("finalise", 10))
    assert told.wait(1) == [("finalise", 10, "", 7)]


def test_a_mistake_of_our_own_is_told_and_logged_and_the_next_order_is_done(tmp_path, told, sealed, caplog):
    sealed[10] = ZeroDivisionError("oh")
    one = keeper(tmp_path, told)
    for step in (10, 20):
        one.do(store("room", step))
        one.do(store("finalise", step))
    assert [word[2] for word in told.wait(4)] == ["", "oh", "", ""]
    assert "step 10 could not be saved" in caplog.text


def owning(tmp_path, told, lost):
    """A keeper whose run and whose location `far` belong to it."""
    run, far = tmp_path / "run", tmp_path / "far"
    run.mkdir()
    (run / "config.json").write_text("{}")
    checkpoint = SimpleNamespace(locations=(str(far),), keep=2, milestones=0, alarm_after=900.0)
    locations = Locations(run, SimpleNamespace(name="lm", checkpoint=checkpoint), "job", lost=lost)
    locations.look()
    one = Storekeeper(run / "checkpoints", run / "metrics.jsonl", Rules(2), told, locations)
    one.begin()
    return one


def test_a_step_is_committed_by_the_owner_alone(tmp_path, told, monkeypatch):
    """Another job takes the run while hosts write a step: that step never comes to exist, and no room for another."""
    lost = []

    def finalise(path, ranks, epoch, mesh, metrics, allowed):  # noqa: ARG001 - as the real one
        allowed()
        (path / layout.MANIFEST).write_text("{}")
        (path / layout.COMMIT_FILE).write_text("yes")
        return 10

    monkeypatch.setattr(storekeeper, "finalise", finalise)
    one = owning(tmp_path, told, lost.append)
    one.do(store("room", 10))
    one.do(store("finalise", 10))
    assert [word[2] for word in told.wait(2)] == ["", ""]
    one.do(store("room", 20))
    told.wait(3)
    record = json.loads((tmp_path / "run" / OWNER).read_bytes())
    (tmp_path / "run" / OWNER).write_text(
        json.dumps({**record, "job": "other", "generation": record["generation"] + 1})
    )
    one.do(store("finalise", 20))
    one.do(store("room", 30))
    assert ["job other, generation 2" in word[2] for word in told.wait(5)[3:]] == [True, True]
    assert [error.job for error in lost] == ["other"]
    assert layout.numbered(tmp_path / "run" / "checkpoints") == [10, 20], "no room was made"
    assert not (tmp_path / "run" / "checkpoints" / "20" / layout.COMMIT_FILE).exists()
    one.close()
    assert json.loads((tmp_path / "run" / OWNER).read_bytes())["job"] == "other"


def test_a_closed_one_begins_nothing_more(tmp_path, told, monkeypatch):
    began, go = threading.Event(), threading.Event()

    def make_room(_, epoch):
        del epoch
        began.set()
        assert go.wait(30)

    monkeypatch.setattr(storekeeper, "make_room", make_room)
    one = keeper(tmp_path, told)
    one.do(store("room", 10))
    one.do(store("room", 20))
    assert began.wait(30)
    one.close()
    go.set()
    assert told.wait(1) == [("room", 10, "", 0)]
    time.sleep(0.1)
    assert len(told.words) == 1


HANGS = """
import threading, sys
from pathlib import Path
from jaxscale.checkpoint.retention import Rules
from jaxscale.supervisor import storekeeper
from jaxscale.supervisor.facts import Store
began = threading.Event()
def make_room(path, epoch):
    began.set()
    threading.Event().wait()
storekeeper.make_room = make_room
one = storekeeper.Storekeeper(Path(sys.argv[1]) / "checkpoints", Path(sys.argv[1]) / "metrics", Rules(2), print)
one.do(Store("room", 10, 1, 1, {}))
began.wait()
one.close()
"""


def test_a_process_ends_while_its_storage_hangs(tmp_path):
    subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], check=True, timeout=60)
