"""Runs with S3 as further location (moto's server on loopback): an outage, a directory that is gone, a lost owner."""

import json
import secrets
import shutil
import threading
import time

import botocore.session
import pytest
from small_runs import command, last_line, losses, train
from small_runs import run as start

from jaxscale.checkpoint import location, step_copy
from jaxscale.checkpoint.durable import SaveFailed
from jaxscale.checkpoint.layout import list_steps
from jaxscale.checkpoint.owner import OWNER
from jaxscale.retry import RetryConfig
from jaxscale.storage.addresses import open_store
from jaxscale.supervisor.status import Watcher
from jaxscale.testing.http_faults import faulty_proxy
from jaxscale.testing.s3_server import s3_server, variables
from jaxscale.track.jsonl import read_metrics
from jaxscale.train.display import Display
from jaxscale.train.protocols import ExitReason

STEPS, EVERY = 220, 20
PACE_SECONDS = 0.03
FLAGS = ("--devices", 2, "--optim.learning-rate", "0.01", "--checkpoint.every", EVERY, "--checkpoint.keep", 2)


@pytest.fixture(scope="module", name="server")
def _server():
    with s3_server() as server:
        yield server


@pytest.fixture(name="proxy")
def _proxy(server, monkeypatch):
    """What all S3 traffic of this process goes through."""
    with faulty_proxy(server.address) as proxy:
        for name, value in variables(proxy.address).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(name="bucket")
def _bucket(proxy):  # noqa: ARG001 - it must be there
    name = f"b{secrets.token_hex(6)}"
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/runs"


@pytest.fixture(name="at_step")
def _at_step(monkeypatch):
    """Functions by what they are to be called with, the step that begins; each step takes PACE_SECONDS longer."""
    calls = []
    original = Display.enter

    def enter(display, section, step):
        original(display, section, step)
        if section == "step":
            for call in calls:
                call(step)
            time.sleep(PACE_SECONDS)

    monkeypatch.setattr(Display, "enter", enter)
    return calls


def events(folder, kind, **fields):
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind and all(line.get(k) == v for k, v in fields.items())]


class Outage:
    """Begins at a step and ends by itself; sees what training and `jaxscale status` do meanwhile."""

    def __init__(self, proxy, run, at, seconds, fault):
        self._proxy, self._run, self._at, self._seconds, self._fault = proxy, run, at, seconds, fault
        self.began = self.over = 0.0
        self.steps, self.seen = [], []
        """When each step of the outage began, and how the place stood then."""

    def __call__(self, step):
        if step == self._at:
            self.began = time.time()
            self._proxy.begin(self._fault)
            threading.Timer(self._seconds, self._end).start()
        if self.began and not self.over:
            self.steps.append(time.time())
            self.seen += Watcher(self._run).look(time.time()).locations

    def _end(self):
        self.over = time.time()
        self._proxy.heal()


def check_outage(run, bucket, outage):
    """Nobody waited, somebody was told, and all was made up for."""
    gaps = [after - before for before, after in zip(outage.steps, outage.steps[1:], strict=False)]
    assert len(gaps) > 50, "training went on"
    assert max(gaps) < 2.0, "no step waited for the place"
    failing = [one for one in outage.seen if one.failing_seconds is not None]
    assert failing, "status says that the place fails"
    assert failing[-1].reason
    assert failing[-1].behind > 0
    (alarm,) = events(run, "alarm", what="location failing")
    assert alarm["time"] - outage.began < 5.0
    (back,) = events(run, "alarm", what="location back")
    assert back["time"] > outage.over
    (state,) = Watcher(run).look(time.time()).locations
    assert (state.step, state.failing_seconds, state.reason, state.lost) == (STEPS, None, "", False)
    there = step_copy.steps_at(open_store(bucket))
    assert there == step_copy.present(open_store(bucket)), "no half of a step is left"
    assert there[-1] == list_steps(run / "checkpoints")[-1] == STEPS


def test_an_outage_holds_up_no_training_and_the_run_goes_on_from_s3_alone(
    tmp_path, proxy, bucket, at_step, monkeypatch
):
    monkeypatch.setattr(location, "COPY_RETRY", RetryConfig(open_seconds=1.0))
    run, further = tmp_path / "run", ("--checkpoint.locations", bucket)
    outage = Outage(proxy, run, 50, 5.0, "503")
    at_step.append(outage)
    assert train(run, *FLAGS, "--steps", STEPS, *further) is ExitReason.COMPLETED
    check_outage(run, bucket, outage)
    at_step.clear()
    shutil.move(run, tmp_path / "kept")
    more = (*FLAGS, "--steps", STEPS + 5)
    assert train(tmp_path / "kept", *more) is ExitReason.COMPLETED
    assert train(run, *more, *further) is ExitReason.COMPLETED
    (fetched,) = events(run, "fetched")
    assert (fetched["step"], fetched["location"]) == (STEPS, bucket)
    after = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["step"] > STEPS]
    assert after == losses(tmp_path / "kept")[STEPS:]
    assert step_copy.steps_at(open_store(bucket))[-1] == STEPS + 5


@pytest.mark.parametrize("place", [pytest.param("run", marks=pytest.mark.slow), "s3"])
def test_a_run_that_another_job_has_taken_stops_and_commits_nothing_more(tmp_path, bucket, at_step, place):
    run = tmp_path / "run"
    stolen = open_store(bucket if place == "s3" else str(run))
    committed = []

    def steal(step):
        if step == 30:
            while step_copy.steps_at(open_store(bucket)) != [20]:
                time.sleep(0.05)
            record = json.loads(stolen.read(OWNER))
            stolen.write(OWNER, json.dumps({**record, "job": "other", "host": "far", "generation": 9}).encode())
            committed.extend(step_copy.steps_at(stolen))

    at_step.append(steal)
    with pytest.raises(SaveFailed, match=r"has lost the run at .*job other, generation 9"):
        train(run, *FLAGS, "--steps", STEPS, "--checkpoint.locations", bucket)
    assert len(read_metrics(run / "metrics.jsonl")) < STEPS
    assert step_copy.steps_at(stolen) == committed == [20]
    assert json.loads(stolen.read(OWNER))["job"] == "other"
    assert events(run, "alarm", what="run lost") or place == "run"


def test_a_second_run_with_a_directory_of_its_own_is_refused_while_the_first_one_lives(tmp_path, bucket, at_step):
    results = []

    def second(step):
        if step == 5:
            there = command(tmp_path / "second", *FLAGS, "--steps", STEPS, "--checkpoint.locations", bucket)
            results.append(start(there))

    at_step.append(second)
    assert train(tmp_path / "run", *FLAGS, "--steps", 20, "--checkpoint.locations", bucket) is ExitReason.COMPLETED
    assert results[0].returncode == 2
    assert f"{bucket} belongs to a run that is alive" in last_line(results[0])
    assert not (tmp_path / "second").exists()
    assert step_copy.steps_at(open_store(bucket)) == [20]
