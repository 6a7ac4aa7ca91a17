"""What becomes of a run after it ended, or on its way: more steps, other weights, phases, hooks, samples, traces."""

import collections
import gzip
import itertools
import json
import math
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import SMALL, at_section, config_of, lines, losses, signal_self, stop_after, train

from jaxscale import tree
from jaxscale.checkpoint.layout import read_manifest
from jaxscale.checkpoint.restore import list_steps, restore_params
from jaxscale.config import ConfigError
from jaxscale.data.corpora import open_corpora
from jaxscale.mesh import make_mesh
from jaxscale.optim.build import make_optimizer
from jaxscale.recipe import Hooks
from jaxscale.train.protocols import ExitReason
from jaxscale.train.state import abstract_state

CONSTANT = ("--optim.schedule", "constant", "--devices", 1)


def params_of(folder, step, *flags, average=False):
    """The weights of a checkpoint, on one device."""
    config = config_of("--devices", 1, *flags)
    with jax.set_mesh(make_mesh(config)):
        task = config.model.task(config)
        wanted = abstract_state(config, task, make_optimizer(config.optim, task.parameters, config.steps))["params"]
        return restore_params(folder / "checkpoints", step, wanted, average=average)


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def contents(folder):
    """What every file of a run says, but for its logs and the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in files if path.parent.name != "logs" and path.name != ".lock"}


def same_bits(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


# More steps


@pytest.fixture(scope="module", name="eight")
def _eight(tmp_path_factory):
    """8 steps at a constant learning rate, on one device. Read only."""
    folder = tmp_path_factory.mktemp("eight") / "run"
    assert train(folder, *CONSTANT, "--steps", 8) is ExitReason.COMPLETED
    return folder


def test_more_steps_go_on_where_the_run_ended(tmp_path, eight, capsys):
    folder = tmp_path / "run"
    assert train(folder, *CONSTANT, "--steps", 3) is ExitReason.COMPLETED
    assert train(folder, *CONSTANT, "--steps", 8) is ExitReason.COMPLETED
    assert lines(folder) == lines(eight)
    out = capsys.readouterr().out
    assert "schedule: constant: 3 steps become 8, the learning rate stays at 1.0e-03" in out
    assert out.splitlines()[-1].startswith("done: 8 steps trained and saved in ")
    assert list_steps(folder / "checkpoints") == [3, 8]
    (restored,) = (event for event in events(folder) if event["kind"] == "restored")
    arrays = len(read_manifest(folder / "checkpoints" / "3").arrays)
    assert (restored["epoch"], restored["step"], restored["sources"]) == (2, 3, {"durable": arrays})
    assert 0 < restored["seconds"] < 60


@pytest.mark.parametrize(("steps", "has"), [(8, "all 8 steps"), (5, "8 steps, not 5,")])
def test_a_finished_run_says_that_there_is_nothing_to_do(tmp_path, eight, capsys, steps, has):
    folder = shutil.copytree(eight, tmp_path / "run")
    before = contents(folder)
    assert train(folder, *CONSTANT, "--steps", steps, "--optim.clip", 0.5) is ExitReason.COMPLETED
    said = capsys.readouterr().out.splitlines()
    assert said == [f"nothing to do: {folder} has {has} already; a higher --steps goes on from there"]
    assert contents(folder) == before


def test_a_finished_run_gets_back_what_a_kill_took_from_its_end(tmp_path, eight):
    folder = shutil.copytree(eight, tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):  # the last step's line, and that the run is done
        whole = (folder / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(whole[:-1]))
    assert [event["kind"] for event in events(eight)][-1] == "done"
    for _ in range(2):
        assert train(folder, *CONSTANT, "--steps", 8) is ExitReason.COMPLETED
    assert lines(folder) == lines(eight)
    assert [event["kind"] for event in events(folder)] == [event["kind"] for event in events(eight)]


def test_a_longer_schedule_is_compared_with_that_of_before(tmp_path, capsys):
    folder, cosine = tmp_path / "run", ("--devices", 1, "--optim.warmup", 0, "--optim.schedule", "cosine")
    assert train(folder, *cosine, "--optim.learning-rate", 1e-3, "--steps", 3) is ExitReason.COMPLETED
    assert train(folder, *cosine, "--optim.learning-rate", 1e-2, "--steps", 6) is ExitReason.COMPLETED
    said = (
        "schedule: cosine decays over 6 steps instead of 3: the learning rate at step 3 rises from 1.0e-04 to 5.5e-03"
    )
    assert said in capsys.readouterr().out


def test_a_run_that_lost_its_checkpoints_says_that_it_starts_over(tmp_path, eight, capsys):
    folder = shutil.copytree(eight, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    assert train(folder, *CONSTANT, "--steps", 8) is ExitReason.COMPLETED
    out = capsys.readouterr().out
    said = "metrics.jsonl goes to step 8, but no checkpoint of the run is there: training starts over from step 0, in "
    said += "epoch 2"
    assert said in out
    assert said in next((folder / "logs").glob("*-0.log")).read_text()
    assert lines(folder) == lines(eight)
    assert train(folder, *CONSTANT, "--steps", 9) is ExitReason.COMPLETED
    assert train(tmp_path / "fresh", *CONSTANT, "--steps", 1) is ExitReason.COMPLETED
    assert "starts over" not in capsys.readouterr().out


def test_a_damaged_checkpoint_pushes_no_good_one_out(tmp_path, capsys):
    folder, flags = tmp_path / "run", (*CONSTANT, "--checkpoint.keep", 3)
    for steps in (2, 4, 6):  # the last state of a run is saved whatever the disk is doing
        assert train(folder, *flags, "--steps", steps) is ExitReason.COMPLETED
    data = max((folder / "checkpoints" / "6" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data.write_bytes(data.read_bytes()[:-8])
    with at_section("step", 4, signal_self()):
        assert train(folder, *flags, "--steps", 8) is ExitReason.STOPPED
    assert "resumed after step 4" in capsys.readouterr().out
    assert list_steps(folder / "checkpoints") == [2, 4, 5, 6], "three that can be read, and the one that cannot"
    assert train(folder, *flags, "--steps", 8) is ExitReason.COMPLETED
    assert "resumed after step 5" in capsys.readouterr().out
    assert list_steps(folder / "checkpoints") == [4, 5, 8]


def test_a_rejected_checkpoint_is_an_event_with_everything_to_find_it_by(tmp_path, eight):
    """The newest of two lacks a file: its name, its step and its folder are told, once, before `restored`."""
    folder = shutil.copytree(eight, tmp_path / "run")
    assert train(folder, *CONSTANT, "--steps", 9) is ExitReason.COMPLETED
    name = max(read_manifest(folder / "checkpoints" / "9").files.items(), key=lambda item: item[1].nbytes)[0]
    (folder / "checkpoints" / "9" / name).unlink()
    before = len(events(folder))
    assert train(folder, *CONSTANT, "--steps", 9) is ExitReason.COMPLETED
    rejected, started, restored = events(folder)[before : before + 3]
    assert [started["kind"], restored["kind"], restored["step"]] == ["worker_started", "restored", 8]
    path = str(folder / "checkpoints" / "9")
    assert (rejected["kind"], rejected["source"], rejected["epoch"]) == ("rejected", "worker", 3)
    assert {name: rejected[name] for name in ("tier", "step", "path", "shard")} == {
        "tier": "durable",
        "step": 9,
        "path": path,
        "shard": "",
    }
    assert rejected["reason"] == f"{path}/{name} is missing (No such file or directory)"
    assert lines(folder)[-1]["step"] == 9
    assert list_steps(folder / "checkpoints") == [8, 9]


# The weights of another run


STILL = ("--optim.learning-rate", 1e-30, "--optim.weight-decay", 0, "--steps", 1)
"""One step that moves no weight."""


def test_init_from_takes_the_weights_and_nothing_else(tmp_path, eight, capsys):
    folder = tmp_path / "run"
    assert train(folder, *CONSTANT, *STILL, "--init-from", f"{eight}@8", "--seed", 5) is ExitReason.COMPLETED
    assert same_bits(params_of(folder, 1), params_of(eight, 8))
    assert [(line["step"], line["row"], line["skipped"]) for line in lines(folder)] == [(1, 0, 0)]
    assert f"weights from step 8 of {eight}; optimizer, schedule and data start afresh" in capsys.readouterr().out


def test_init_from_takes_the_average_where_the_run_keeps_one(tmp_path, half_average):
    folder = tmp_path / "run"
    assert train(folder, *CONSTANT, *STILL, "--init-from", half_average) is ExitReason.COMPLETED
    assert same_bits(params_of(folder, 1), params_of(half_average, 6, average=True))
    assert not same_bits(params_of(folder, 1), params_of(half_average, 6))


def test_init_from_an_unknown_step_lists_the_steps(tmp_path, half_average):
    with pytest.raises(ConfigError, match=r"has no checkpoint of step '7'; it has 6$"):
        train(tmp_path / "run", *CONSTANT, "--init-from", f"{half_average}@7")
    with pytest.raises(
        ConfigError, match=r"layers/mlp/up: checkpoint float32\[1,32,64\], this run float32\[1,32,128\]"
    ) as error:
        train(tmp_path / "run", *CONSTANT, "--init-from", half_average, "--model.mlp", 128)
    remedy = (
        "use the model settings of the run that saved it, or weights that fit (--init-from), or say what becomes of"
    )
    assert str(error.value).splitlines()[-1].startswith(remedy)
    assert not (tmp_path / "run").exists()


def test_init_from_another_model_says_what_becomes_of_each_difference(tmp_path, eight, capsys):
    """A model whose head is tied takes the rest of one whose head is free, and the other way round."""
    tied, free = ("--model.tied", "--seed", 5), ("--seed", 5)
    with pytest.raises(
        ConfigError, match=r"head/weight: checkpoint float32\[.*\], this run has no place for it\n.*--init-map"
    ):
        train(tmp_path / "tied", *CONSTANT, *STILL, *tied, "--init-from", eight)
    flags = ("--init-from", eight, "--init-map", "=head")
    assert train(tmp_path / "tied", *CONSTANT, *STILL, *tied, *flags) is ExitReason.COMPLETED
    before = params_of(eight, 8)
    del before["head"]
    assert same_bits(params_of(tmp_path / "tied", 1, "--model.tied"), before)
    back = ("--init-from", tmp_path / "tied")
    with pytest.raises(ConfigError, match=r"head/weight: this run .*, checkpoint absent"):
        train(tmp_path / "free", *CONSTANT, *STILL, *free, *back)
    assert train(tmp_path / "free", *CONSTANT, *STILL, *free, *back, "--init-map", "head=") is ExitReason.COMPLETED
    assert (
        f"weights from step 1 of {tmp_path / 'tied'}, but head/weight from the seed; optimizer"
        in capsys.readouterr().out
    )
    train(tmp_path / "seed", *CONSTANT, *STILL, *free)
    mixed, seeded = params_of(tmp_path / "free", 1), params_of(tmp_path / "seed", 1)
    assert same_bits({"head": mixed.pop("head")}, {"head": seeded["head"]})
    assert same_bits(mixed, before)
    with pytest.raises(ConfigError, match="--init-map says what --init-from loads; give that too"):
        train(tmp_path / "none", *CONSTANT, *STILL, "--init-map", "=head")


def test_a_resume_does_not_go_back_to_init_from(tmp_path, half_average, capsys):
    flags = (*CONSTANT, "--steps", 4, "--init-from", half_average)
    stop_after(tmp_path / "run", 2, *flags)
    assert train(tmp_path / "run", *flags) is ExitReason.COMPLETED
    assert train(tmp_path / "whole", *flags) is ExitReason.COMPLETED
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert "resumed after step 2" in capsys.readouterr().out


@pytest.fixture(scope="module", name="half_average")
def _half_average(tmp_path_factory):
    """6 steps with a moving average of the weights. Read only."""
    folder = tmp_path_factory.mktemp("average") / "run"
    assert train(folder, *CONSTANT, "--steps", 6, "--optim.ema", 0.9) is ExitReason.COMPLETED
    return folder


# Phases


@pytest.fixture(scope="module", name="texts")
def _texts(tmp_path_factory):
    """Three corpora that share no byte."""
    folder = tmp_path_factory.mktemp("texts")
    for name, letters in {"a": "abcdef", "b": "uvwxyz", "c": "UVWXYZ"}.items():
        draw = np.random.default_rng(len(name))
        documents = ["".join(draw.choice(list(letters), 300)) for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def share_of(letters):
    """The share of a batch's tokens that are one of these."""

    def shares(params, batch):  # noqa: ARG001 -- the signature of a hook
        is_one = sum(batch["tokens"] == ord(letter) for letter in letters)
        return {letters: jnp.sum(is_one * batch["loss_weight"])}

    return Hooks(step_metrics=shares)


def phase_flags(texts):
    mixture = f"mixture={texts / 'b.jsonl'}:0.75+{texts / 'c.jsonl'}:0.25"
    return (
        *("--data.path", texts / "a.jsonl", "--steps", 9, *CONSTANT),
        *("--phases", "3:sequence=48,batch=4", f"6:{mixture},batch=16"),
    )


@pytest.fixture(scope="module", name="phased")
def _phased(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("phased") / "run"
    assert train(folder, *phase_flags(texts), hooks=share_of("bU")) is ExitReason.COMPLETED
    return folder


def test_phases_change_rows_sequence_and_mixture_at_their_steps(phased):
    found = lines(phased)
    assert [line["rows"] for line in found] == [8, 8, 8, 4, 4, 4, 16, 16, 16]
    assert [line["row"] for line in found] == [0, 8, 16, 24, 28, 32, 36, 52, 68]
    per_row = [line["tokens"] / line["rows"] for line in found]
    assert all(28 <= n <= 32 for n in per_row[:3])
    assert all(44 <= n <= 48 for n in per_row[3:])
    shares = [line["bU"] for line in found]
    assert all(0.1 < share < 0.25 for share in shares[:6]), "b is one of the six letters of the first corpus"
    assert all(0 < share < 0.1 for share in shares[6:]), "U is one of six of the last, which has a quarter"


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_resume_inside_a_phase_and_at_its_border_is_exact(tmp_path, texts, phased, step):
    stop_after(tmp_path / "run", step, *phase_flags(texts), hooks=share_of("bU"))
    assert train(tmp_path / "run", *phase_flags(texts), hooks=share_of("bU")) is ExitReason.COMPLETED
    assert lines(tmp_path / "run") == lines(phased)


def test_a_phase_may_be_added_to_a_finished_run(tmp_path, texts, phased):
    first = phase_flags(texts)[: -len(("--phases", "first", "second"))]
    assert train(tmp_path / "run", *first, "--steps", 3, hooks=share_of("bU")) is ExitReason.COMPLETED
    assert train(tmp_path / "run", *phase_flags(texts), hooks=share_of("bU")) is ExitReason.COMPLETED
    assert lines(tmp_path / "run") == lines(phased)
    with pytest.raises(ConfigError, match=r"rows in another order \(phases: "):
        train(tmp_path / "run", *phase_flags(texts)[:-1], phase_flags(texts)[-1].replace("6:", "5:"), "--steps", 12)


# Hooks, statistics, samples, traces


def test_hooks_write_beside_the_built_in_metrics(tmp_path):
    seen = []

    def count(context):
        batches = list(context.batches())
        seen.append((context.step, len(batches), sorted(context.params)))
        return {"batches": len(batches), "norm": float(jnp.linalg.norm(context.params["norm"]["scale"]))}

    def weights(params, batch):
        return {"ones": batch["loss_weight"].sum(), "scale": params["norm"]["scale"][0] * batch["loss_weight"].sum()}

    hooks = Hooks(step_metrics=weights, evaluations={"mine": count})
    flags = ("--steps", 4, "--evaluate.every", 2, "--train.microbatches", 2, "--devices", 2)
    assert train(tmp_path / "run", *flags, "--data.held-out-documents", 1, hooks=hooks) is ExitReason.COMPLETED
    found = lines(tmp_path / "run")
    assert [line["ones"] for line in found] == [1.0] * 4
    assert found[0]["scale"] == 1.0 != found[-1]["scale"]
    assert [sorted(key for key in line if key.startswith("mine/")) for line in found] == [
        [],
        ["mine/batches", "mine/norm"],
    ] * 2
    branches = ["embed", "head", "layers", "norm"]
    assert [(step, params) for step, _, params in seen] == [(2, branches), (4, branches)]
    assert found[1]["mine/batches"] == seen[0][1] > 1


def test_layer_statistics_noise_scale_and_spike_score(whole):
    found = lines(whole)
    with_layers = [line["step"] for line in found if any(key.startswith("layers/") for key in line)]
    assert with_layers == [4, 8, 12]
    line = found[3]
    kinds = {key.split("/")[1] for key in line if key.startswith("layers/")}
    assert kinds == {"gradient", "weight", "update"}
    assert len(line["layers/gradient/layers/mlp/up"]) == 1
    squares = [np.sum(np.square(v)) for k, v in line.items() if k.startswith("layers/gradient/")]
    assert math.sqrt(sum(squares)) == pytest.approx(line["grad_norm"], rel=1e-5)
    assert all({"noise_scale", "noise_trace", "signal"} <= line.keys() for line in found)
    assert [line["spike"] != 0 for line in found] == [False] * 8 + [True] * 4


def test_layer_statistics_are_the_norms_of_weights_and_updates(tmp_path):
    """Against the checkpoints before and after a step, by NumPy in float64; two layers of unlike weights."""
    folder, flags = tmp_path / "run", (*CONSTANT, "--model.layers", 2, "--run.layer-stats-every", 4)
    for steps in (3, 4):  # the last state of a run is always saved
        assert train(folder, *flags, "--steps", steps) is ExitReason.COMPLETED
    before, after = (
        {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params_of(folder, step, *flags)).items()}
        for step in (3, 4)
    )
    line = lines(folder)[3]
    kinds = {"weight": after, "update": {path: after[path] - before[path] for path in after}}
    expected = {
        f"layers/{kind}/{path}": norms(path, x) for kind, by_path in kinds.items() for path, x in by_path.items()
    }
    found = {name: value for name, value in line.items() if name.startswith(("layers/weight/", "layers/update/"))}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    ups, downs = found["layers/update/layers/mlp/up"], found["layers/update/layers/mlp/down"]
    assert len({*ups, *downs}) == 4, "each parameter and layer has a number of its own"


def norms(path, weights):
    """One norm per layer of a stacked parameter, else one."""
    axes = tuple(range(1, weights.ndim)) if path.startswith("layers/") else None
    return np.sqrt(np.square(weights).sum(axis=axes)).tolist()


def test_samples(tmp_path, capsys):
    flags = ("--steps", 4, "--devices", 2, "--sample.every", 2, "--sample.prompt", "Story 1", "--sample.tokens", 5)
    assert train(tmp_path / "run", *flags) is ExitReason.COMPLETED
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(2, "Story 1"), (4, "Story 1")]
    assert all(sample["text"] for sample in samples)
    assert "step 2 sample: Story 1" in capsys.readouterr().out
    assert train(tmp_path / "without", "--steps", 4, "--devices", 2) is ExitReason.COMPLETED
    assert losses(tmp_path / "run") == losses(tmp_path / "without")


def test_a_trace_of_some_steps(tmp_path):
    """It opens, and holds exactly the steps asked for with what the devices computed in them."""
    assert train(tmp_path / "run", "--steps", 5, "--devices", 1, "--run.profile", "2:3") is ExitReason.COMPLETED
    assert len(losses(tmp_path / "run")) == 5
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    operations = collections.defaultdict(set)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for event in (event for line in plane.lines for event in line.events):
            with warnings.catch_warnings(action="ignore"):  # of a type that names no module
                facts = dict(event.stats)
            if facts.get("hlo_module") == "jit_train_step":
                operations[facts["run_id"]].add(event.name)
    assert len(operations) == 2, "two executions of the step"
    first, second = operations.values()
    assert first == second
    assert len(first) > 50
    assert any("dot" in name for name in first), "the matrix products of the model"
    with gzip.open(trace.with_name(trace.name.replace("xplane.pb", "trace.json.gz"))) as file:
        assert first <= {event.get("name") for event in json.load(file)["traceEvents"]}, "what Perfetto shows"


def test_a_resumed_run_traces_its_own_early_steps_or_says_why_not(tmp_path, capsys):
    flags = ("--devices", 1, "--checkpoint.every", 2)
    assert train(tmp_path / "run", "--steps", 4, *flags) is ExitReason.COMPLETED
    capsys.readouterr()
    assert train(tmp_path / "run", "--steps", 5, *flags, "--run.profile", "2:3") is ExitReason.COMPLETED
    assert "run.profile 2:3 lies before step 5, where this start goes on: nothing is traced" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()
    assert train(tmp_path / "run", "--steps", 6, *flags, "--run.profile", "early") is ExitReason.COMPLETED
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


# What an evaluation says


def test_evaluation_against_a_separate_computation(tmp_path):
    """Every held-out token but the first of each document, predicted from its document inside a window of 32."""
    flags = ("--steps", 3, "--devices", 1, "--data.held-out-documents", 2)
    assert train(tmp_path / "run", *flags) is ExitReason.COMPLETED
    config = config_of(*flags)
    params = jax.device_get(params_of(tmp_path / "run", 3))
    corpus = open_corpora(config).by_address["builtin"].held_out
    stream, starts = (array[0] for array in corpus.gather(np.array([0]), corpus.length))
    total, count = 0.0, 0
    for first in range(0, len(stream) - 1, 32):
        window = stream[first : first + 33]
        borders = [0, *(i for i in range(1, len(window)) if starts[first + i]), len(window)]
        for begin, end in itertools.pairwise(borders):
            if end - begin > 1:
                total += float(nats(params, config, window[begin:end]))
                count += end - begin - 1
    line = lines(tmp_path / "run")[-1]
    documents = int(starts.sum())
    assert (line["eval_tokens"], count, documents) == (len(stream) - documents, len(stream) - documents, 2)
    assert line["eval_loss"] == pytest.approx(total / count, abs=1e-5)
    assert line["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    text = bytes(int(token) for token in stream if token < 256)
    assert line["eval_bits_per_byte"] == pytest.approx(total / math.log(2) / len(text), rel=1e-5)


def nats(params, config, tokens):
    """The sum of -log p of the tokens after the first, by plain NumPy and float64; one layer, as `SMALL` has it."""
    model = config.model
    assert (model.layers, model.heads, SMALL[:2]) == (1, 2, ("--model.layers", "1"))
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = jax.tree.map(lambda w: w[0], weights["layers"])

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * scale

    def rotate(x):
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * model.rope.theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["embed"]["table"][tokens[:-1]]
    normed = norm(x, layer["attention_norm"]["scale"])
    q, k, v = (np.einsum("sd,dhk->shk", normed, layer["attention"][name]) for name in "qkv")
    scores = np.einsum("shk,thk->hst", rotate(q), rotate(k)) / math.sqrt(model.dim_per_head)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    attention = np.exp(scores - scores.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    x = x + np.einsum("hst,thk,hkd->sd", attention, v, layer["attention"]["o"])
    normed = norm(x, layer["mlp_norm"]["scale"])
    gate = normed @ layer["mlp"]["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (normed @ layer["mlp"]["up"])) @ layer["mlp"]["down"]
    logits = norm(x, weights["norm"]["scale"]) @ weights["head"]["weight"]
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(x)), tokens[1:]].sum()
