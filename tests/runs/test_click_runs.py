"""Runs of a recommendation model: resumed, moved to other meshes, reported, and refused.

One undisturbed run on 2 devices is what the others are compared with.
"""

import json
import shutil

import numpy as np
import pytest
from small_runs import ROOT, at_section, environment, signal_self

from jaxscale import trainer
from jaxscale.checkpoint.layout import newest_step
from jaxscale.commands.train import read
from jaxscale.config import ConfigError, MeshConfig
from jaxscale.data.click_file import open_clicks
from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.make_clicks import make_clicks
from jaxscale.generate.load import GenerateError, load_run
from jaxscale.testing.processes import PLACE, run_world
from jaxscale.track.jsonl import read_metrics
from jaxscale.train.protocols import ExitReason, World

RECIPE = str(ROOT / "recipes" / "dlrm_clicks.py")
TABLES, HOTS = (300, 40, 7), (1, 2, 1)
SMALL = (
    *("--model.tables", "300", "40", "7", "--model.hots", "1", "2", "1", "--model.dense", "3", "--model.width", "8"),
    *("--model.bottom", "8", "--model.top", "8", "--model.placement", "row", "column", "table"),
    *("--data.batch", "16", "--data.held-out-documents", "40", "--evaluate.every", "4", "--steps", "8"),
    *("--checkpoint.every", "4", "--train.microbatches", "2", "--optim.warmup", "2"),
)
CLOCKS = ("time", "step_seconds", "pause_seconds", "epoch")


@pytest.fixture(scope="module", name="log")
def _log(tmp_path_factory):
    """110 rows to train on, so that 8 steps of 16 begin a second pass. Read only."""
    folder = tmp_path_factory.mktemp("clicks") / "log"
    make_clicks(folder, 150, TABLES, HOTS, 3, seed=5)
    return folder


def train(folder, log, *flags):
    config = read([RECIPE, *SMALL, "--data.path", str(log), "--run.dir", str(folder), *flags])[1].config
    return trainer.train(config, World())


def lines(folder):
    found = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in found]


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory, log):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, log, "--devices", "2") is ExitReason.COMPLETED
    return folder


def test_a_resumed_run_has_the_bits_of_the_whole_one(whole, log, tmp_path, capsys):
    with at_section("step", 4, signal_self()):
        assert train(tmp_path / "run", log, "--devices", "2") is ExitReason.STOPPED
    assert train(tmp_path / "run", log, "--devices", "2") is ExitReason.COMPLETED
    assert lines(tmp_path / "run") == lines(whole)
    said = capsys.readouterr().out
    assert "16 examples" in said
    assert "110 examples" in said
    assert "tokens" not in said


def test_a_checkpoint_moves_to_another_mesh(whole, log, tmp_path):
    """Tables and accumulators of 2 devices go on over 4, with the width over tensor."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert newest_step(tmp_path / "run" / "checkpoints") == 4
    assert train(tmp_path / "run", log, "--devices", "4", "--mesh.tensor", "2") is ExitReason.COMPLETED
    for mine, theirs in zip(lines(tmp_path / "run"), lines(whole), strict=True):
        assert (mine["row"], mine["rows"], mine["examples"]) == (theirs["row"], theirs["rows"], theirs["examples"])
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine.get("eval_auc") == pytest.approx(theirs.get("eval_auc"), abs=2e-3)
        assert mine.get("eval_loss") == pytest.approx(theirs.get("eval_loss"), abs=1e-6)


def test_a_world_of_two_processes(whole, log, tmp_path):
    """Each reads and keeps its own rows; the figures, the AUC's among them, are of both."""
    words = [RECIPE, *SMALL, "--data.path", str(log), "--run.dir", str(tmp_path / "run"), "--devices", "2"]
    run_world([*words, "--distributed", PLACE], 2, environment=environment())
    for mine, theirs in zip(lines(tmp_path / "run"), lines(whole), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_nothing_is_generated(whole):
    with pytest.raises(GenerateError, match=r"trained a DlrmConfig, a model of examples: no text"):
        load_run(whole, 8, on="", devices=2, mesh=MeshConfig())


def test_what_is_written(whole, log):
    last = lines(whole)[-1]
    file = open_clicks(log)
    assert (last["examples"], last["eval_examples"]) == (16, 40)
    assert last["table_unique"] <= last["table_ids"] <= 16 * sum(HOTS)
    assert "tokens" not in last
    assert not (whole / "tokenizer").exists()
    label, chance = np.array(file.label[-40:]), np.array(file.probability[-40:])
    wins = [(p > n) + (p == n) / 2 for p in chance[label == 1] for n in chance[label == 0]]
    assert last["eval_auc_best"] == pytest.approx(np.mean(wins))
    assert 0 <= last["eval_auc_error"] < 0.01


def test_another_log_is_refused_on_a_resume(whole, tmp_path):
    other = tmp_path / "other"
    make_clicks(other, 150, TABLES, HOTS, 3, seed=6)
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(DataError, match=r"not the data that the checkpoint was trained on.*click log: content"):
        train(tmp_path / "run", other, "--devices", "2", "--steps", "9")


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        (("--data.path", ""), DataError, "the run has no data"),
        (("--data.path", "builtin:many"), DataError, "write builtin or builtin:ROWS"),
        (("--data.path", "nowhere"), DataError, "nowhere is no click log"),
        (("--model.dense", "4"), DataError, "has 3 dense features, model.dense is 4"),
        (("--model.tables", "299", "40", "7"), DataError, "feature c1 has ids up to 299, .* has 299 rows"),
        (("--model.hots", "1", "1", "1"), DataError, "feature c2 has 2 ids, model.hots 1"),
        (("--data.held-out-documents", "150"), DataError, "hold out at most 149"),
        (("--optim.ema", "0.9"), ConfigError, "optim.ema does not go with embedding tables"),
        (("--sample.every", "2", "--sample.prompt", "a"), ConfigError, "sample.every .* no text"),
        (("--devices", "8", "--mesh.context", "2"), ConfigError, "mesh axis 'context' .2. shards nothing"),
        (("--devices", "8", "--mesh.stage", "2"), ConfigError, "mesh axis 'stage' .2. shards nothing"),
        (("--devices", "8", "--model.bins", "4"), ConfigError, r"table_bins \(4\) of tables/table; use 1, 2 or 4"),
        (("--devices", "8", "--model.width", "12"), ConfigError, r"table_columns \(12\) of tables/column; use 1, 2, 3"),
        (("--devices", "7"), ConfigError, r"table_rows \(3072\) of tables/row; use 1, 2, 3, 4, 6, 8"),
    ],
)
def test_refusals(flags, error, said, log, tmp_path):
    with pytest.raises(error, match=said):
        train(tmp_path / "run", log, "--devices", "2", *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("ids/c2", 40, "ids/c2 has 40 in row 17; the feature has ids 0 to 39, and -1 for none"),
        ("ids/c1", -2, "ids/c1 has -2 in row 17"),
        ("label", 2, "label.npy has 2 in row 17; a label is 0 or 1"),
        ("dense/i3", float("nan"), "dense/i3 has nan in row 17; use finite numbers"),
    ],
)
def test_bad_values_are_named_with_column_and_row(column, value, said, tmp_path):
    make_clicks(tmp_path, 30, TABLES, HOTS, 3, seed=1)
    values = np.load(tmp_path / f"{column}.npy")
    values[17] = value
    np.save(tmp_path / f"{column}.npy", values)
    file = open_clicks(tmp_path)
    file.read(np.array([3, 16, 18]))
    with pytest.raises(DataError, match=said):
        file.read(np.array([3, 17]))


def test_damaged_logs(tmp_path):
    make_clicks(tmp_path, 30, TABLES, HOTS, 3, seed=1)
    header = json.loads((tmp_path / "clicks.json").read_text())
    (tmp_path / "clicks.json").write_text(json.dumps({**header, "rows": 31}))
    with pytest.raises(DamagedData, match=r"label.npy is uint8 \(30,\), clicks.json says uint8 \(31,\)"):
        open_clicks(tmp_path)
    (tmp_path / "clicks.json").write_text(json.dumps(header))
    (tmp_path / "ids" / "c3.npy").unlink()
    with pytest.raises(DamagedData, match=r"has no column ids/c3.npy, which its clicks.json names"):
        open_clicks(tmp_path)
    (tmp_path / "clicks.json").write_text("{")
    with pytest.raises(DamagedData, match="cannot be read"):
        open_clicks(tmp_path)
