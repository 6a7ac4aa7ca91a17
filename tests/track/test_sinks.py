"""Trackers: what they are given, what happens when they fail. TensorBoard is the real one; W&B and MLflow are stand-ins
that take the calls of wandb 0.31 and mlflow-skinny 3.17, with which the writers were tried by hand."""

import logging
import math
import sys
import types

import pytest

from jaxscale import config
from jaxscale.config import ConfigError
from jaxscale.track.jsonl import JsonlMetrics, read_metrics
from jaxscale.track.sinks import Secondary, check_trackers, make_sinks, scalars

LINE = {
    "step": 3,
    "epoch": 1,
    "loss": 1.5,
    "time": 10.0,
    "layers": {"a/b": {"norm": 2.0}},
    "note": "x",
    "odd": math.nan,
}


def make_config(*track):
    return config.Config("test", config.ModelConfig(), run=config.RunConfig(track=track))


def run(sinks, *metric_lines):
    for line in metric_lines:
        for sink in sinks:
            sink.write(line)
    for sink in sinks:
        sink.close()


def test_the_numbers_of_a_line():
    assert dict(scalars({k: v for k, v in LINE.items() if k != "odd"} | {"done": True})) == {
        "epoch": 1.0,
        "loss": 1.5,
        "layers/a/b/norm": 2.0,
    }
    assert dict(scalars({"layers/weight/up": [0.5, 2], "step": 1})) == {
        "layers/weight/up/0": 0.5,
        "layers/weight/up/1": 2.0,
    }


def test_a_plain_run_writes_metrics_only(tmp_path):
    (sink,) = make_sinks(make_config(), tmp_path)
    assert isinstance(sink, JsonlMetrics)
    run([sink], {"step": 1, "loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    run(make_sinks(make_config("tensorboard"), tmp_path), LINE, LINE | {"step": 4, "loss": 1.25})
    run(make_sinks(make_config("tensorboard"), tmp_path), LINE | {"step": 4, "loss": 0.5, "epoch": 2})
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.5, 0.5]
    found = []
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [
                (event.step, value.tag, value.simple_value) for value in event.summary.value if value.tag == "loss"
            ]
            at += size + 16
    assert found == [(3, "loss", 1.5), (4, "loss", 1.25), (4, "loss", 0.5)]


@pytest.mark.parametrize(
    ("tracker", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_package_says_which_extra_to_install(tmp_path, monkeypatch, tracker, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package '{package}.*pip install 'jaxscale\[track\]', or leave"):
        make_sinks(make_config(tracker), tmp_path)
    with pytest.raises(ConfigError, match="needs the package"):
        check_trackers(make_config(tracker))
    assert not list(tmp_path.iterdir()), "nothing is half-written"


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []
    fake_run = types.SimpleNamespace(
        define_metric=lambda *names, **options: calls.append(("define_metric", names, options)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish",)),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options)) or fake_run
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        run(make_sinks(make_config("wandb"), tmp_path), {"step": 3, "loss": 1.5})
    first, second = (options for name, *rest in calls if name == "init" for options in rest)
    assert first == second
    assert (first["resume"], first["dir"], first["project"]) == ("allow", str(tmp_path), "test")
    assert first["config"]["steps"] == 100
    assert ("log", {"step": 3, "loss": 1.5}) in calls
    assert ("define_metric", ("*",), {"step_metric": "step"}) in calls
    assert calls[-1] == ("finish",)


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls, address = [], []
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()

    class Client:
        def __init__(self, tracking_uri):
            address.append(tracking_uri)

        def get_experiment_by_name(self, name):
            assert name == "test"

        def create_run(self, experiment, run_name):
            assert (experiment, run_name) == ("7", "test-run")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def create_experiment(self, name):
            return "7" if name == "test" else None

        def log_param(self, run, key, value):
            calls.append(("param", run, key, value))

        def log_batch(self, run, metrics):
            calls.append(("batch", run, metrics))

        def update_run(self, run, status):
            calls.append(("update", run, status))

        def set_terminated(self, run):
            calls.append(("end", run))

    module = types.ModuleType("mlflow")
    module.MlflowClient = Client
    module.entities = types.SimpleNamespace(Metric=lambda *fields: fields)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    run(make_sinks(make_config("mlflow"), tmp_path), {"step": 3, "loss": 1.5, "time": 2.0})
    assert ("param", "r1", "optim.learning_rate", "0.0003") in calls
    assert calls[-2:] == [("batch", "r1", [("loss", 1.5, 2000, 3)]), ("end", "r1")]
    calls.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example")
    run(make_sinks(make_config("mlflow"), tmp_path), {"step": 4, "loss": 1.5, "time": 2.0})
    assert calls == [("update", "r1", "RUNNING"), ("batch", "r1", [("loss", 1.5, 2000, 4)]), ("end", "r1")]
    assert address == [(tmp_path / "mlflow").as_uri(), "http://tracking.example"]


def test_a_tracker_that_fails_does_not_end_the_training(caplog):
    class Broken:
        lines = 0

        def write(self, line):
            self.lines += bool(line)
            raise ConnectionError("the server is away")

        def close(self):
            raise AssertionError("it gave up before")

    broken = Broken()
    sink = Secondary("wandb", broken)
    with caplog.at_level(logging.WARNING):
        run([sink], LINE, LINE, LINE)
    assert broken.lines == 1
    assert [record.getMessage() for record in caplog.records] == [
        "could not write to the tracker 'wandb', training goes on without it (metrics.jsonl has everything): "
        "ConnectionError: the server is away"
    ]
