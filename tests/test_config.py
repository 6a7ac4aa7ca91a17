"""Configs: every field is read somewhere, what they refuse, and how they print, hash and differ."""

import ast
import dataclasses
import functools
import typing
from pathlib import Path

import pytest

from jaxscale.axes import AXES
from jaxscale.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    RematConfig,
    RunConfig,
    SampleConfig,
    SourceConfig,
    TrainConfig,
    config_hash,
    diff,
    flatten,
    to_dict,
    to_text,
)
from jaxscale.mesh import mesh_sizes_for
from jaxscale.models.dlrm_config import DlrmConfig
from jaxscale.models.rope_config import RopeConfig
from jaxscale.models.transformer_config import TransformerConfig

PACKAGE = Path(__file__).resolve().parent.parent / "jaxscale"


def config(**fields: typing.Any) -> Config:
    return Config("test", TransformerConfig(), **fields)


# Every field is read

OTHER_CLASSES = (TransformerConfig, DlrmConfig, RopeConfig, SourceConfig, PhaseConfig)
"""Config classes that no field of Config names as its type."""

CALLED = {
    ModelConfig: {"model", "config"},
    TransformerConfig: {"model", "config"},
    DlrmConfig: {"model", "config"},
    RopeConfig: {"rope", "config"},
    SourceConfig: {"source"},
    PhaseConfig: {"phase"},
    RematConfig: {"config"},
}
"""What code calls an instance of a class, beside the field of Config that holds it."""


class Reads(ast.NodeVisitor):
    """Collects attribute name -> the names of what it is read from; `self` goes by the name of its class.

    What a class reads of itself to check itself is no use of the field.
    """

    def __init__(self):
        self.found: dict[str, set[str]] = {}
        self._class = ""

    def visit_ClassDef(self, node):
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node):
        if node.name != "__post_init__":
            self.generic_visit(node)

    def visit_Attribute(self, node):
        self.generic_visit(node)
        owner = getattr(node.value, "attr", None) or getattr(node.value, "id", "")
        if isinstance(node.ctx, ast.Load):
            self.found.setdefault(node.attr, set()).add(self._class if owner == "self" else owner.lstrip("_"))


@functools.cache
def reads(folder: Path = PACKAGE) -> dict[str, set[str]]:
    """What all code below a folder reads."""
    visitor = Reads()
    for path in folder.rglob("*.py"):
        visitor.visit(ast.parse(path.read_text()))
    return visitor.found


def sections() -> dict[type, set[str]]:
    """Config and all classes below it -> the names that an instance goes by."""
    hints = typing.get_type_hints(Config)
    named = {kind: {name} for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    classes = {Config: {"config"}, **named, **{kind: set() for kind in OTHER_CLASSES}}
    return {kind: names | CALLED.get(kind, set()) | {kind.__name__} for kind, names in classes.items()}


def unread(found: dict[str, set[str]], classes: dict[type, set[str]]) -> list[str]:
    """The fields that nobody reads from an instance of their class."""
    return [
        f"{kind.__name__}.{field.name}"
        for kind, owners in classes.items()
        for field in dataclasses.fields(kind)
        if not owners & found.get(field.name, set())
    ]


def test_every_field_is_read_somewhere():
    classes = sections()
    del classes[MeshConfig]  # read as a whole, by `asdict`: the next test
    assert {Config, ModelConfig, OptimConfig, RunConfig, TransformerConfig, PhaseConfig} <= classes.keys()
    left = unread(reads(), classes)
    assert not left, f"no code in jaxscale/ reads {', '.join(left)}: use the field or delete it"


@pytest.mark.parametrize("axis", [field.name for field in dataclasses.fields(MeshConfig)])
def test_every_axis_of_a_config_reaches_its_mesh(axis):
    sizes = {axis: 3, "data" if axis == "fsdp" else "fsdp": 2}
    asked = config(devices=6, mesh=MeshConfig(**sizes))
    assert mesh_sizes_for(asked) == dict.fromkeys(AXES, 1) | sizes


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("def f(optim): return optim.rate, optim.decay", []),
        ("def f(config): return config.optim.rate", ["Optim.decay"]),
        ("def f(optim, data): return optim.rate, data.decay", ["Optim.decay"]),
        ("def f(optim): optim.rate = optim.decay", ["Optim.rate"]),
        ("class Optim:\n  def g(self): return self.rate + self.decay", []),
        ("class Other:\n  def g(self): return self.rate + self.decay", ["Optim.rate", "Optim.decay"]),
        ("class Optim:\n  def __post_init__(self): assert self.rate\n  def g(self): return self.decay", ["Optim.rate"]),
    ],
)
def test_a_field_that_nothing_reads_is_found(tmp_path, code, left):
    (tmp_path / "code.py").write_text(code)
    kind = dataclasses.make_dataclass("Optim", [("rate", float), ("decay", float)])
    assert unread(reads(tmp_path), {kind: {"optim", "Optim"}}) == left


@pytest.mark.parametrize("kind", [Config, DataConfig, CheckpointConfig, TransformerConfig, SourceConfig])
def test_a_field_that_is_added_to_a_class_and_not_read_is_found(kind):
    """Also one whose name other things have: `steps` of a part of the config is not `steps` of the config."""
    names = sections()[kind]
    added = dataclasses.make_dataclass(kind.__name__, ["name_that_nothing_reads", "returncode"])
    assert "returncode" in reads(), "read of processes"
    left = [f"{kind.__name__}.{name}" for name in ("name_that_nothing_reads", "returncode")]
    assert unread(reads(), {added: names}) == left


# What they refuse


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: config(steps=0), "--steps is 0"),
        (lambda: config(steps=2**31), "counts up to 2147483647"),
        (lambda: config(devices=100_000_000), "at most 4096 CPU devices are emulated"),
        (lambda: OptimConfig(learning_rate=1e300), "float32 weights overflow"),
        (lambda: config(devices=-1), "--devices is -1"),
        (lambda: config(seed=-1), "--seed is -1; use 0 to 4294967295"),
        (lambda: config(seed=2**32), "--seed is 4294967296"),
        (lambda: config(steps=4, run=RunConfig(profile="5:9")), "run.profile is '5:9', but the run ends after step 4"),
        (lambda: MeshConfig(tensor=0), "mesh.tensor is 0"),
        (lambda: SourceConfig(""), "empty path"),
        (lambda: SourceConfig("a", -1), "weight -1"),
        (lambda: DataConfig(sequence=1), "data.sequence is 1"),
        (lambda: DataConfig(path="a", mixture=(SourceConfig("b"),)), "both set"),
        (lambda: PhaseConfig(0), "the run itself is the phase from step 0"),
        (lambda: config(phases=(PhaseConfig(9), PhaseConfig(5))), "in growing order"),
        (lambda: OptimConfig(learning_rate=0), "optim.learning-rate is 0"),
        (lambda: OptimConfig(ema=1.0), "optim.ema is 1.0"),
        (lambda: OptimConfig(final=2.0), "optim.final is 2.0"),
        (lambda: TrainConfig(microbatches=0), "train.microbatches is 0"),
        (lambda: TrainConfig(noise_scale=True), "set train.microbatches to 2 or more"),
        (lambda: TrainConfig(z_loss=-1.0), "train.z-loss is -1.0"),
        (lambda: TrainConfig(loss_chunk=-5), "train.loss-chunk is -5"),
        (lambda: TrainConfig(skip_spikes_above=-1.0), "train.skip-spikes-above is -1.0"),
        (lambda: PhaseConfig(5, batch=-4), "the phase from step 5 has sequence 0 and batch -4"),
        (lambda: PhaseConfig(5, sequence=1), "the phase from step 5 has sequence 1 and batch 0"),
        (
            lambda: config(data=DataConfig(batch=6), train=TrainConfig(microbatches=4)),
            "use train.microbatches of 1, 2, 3, 6",
        ),
        (
            lambda: config(phases=(PhaseConfig(5, batch=5),), train=TrainConfig(microbatches=4)),
            "a batch of 5 rows cannot be split into 4",
        ),
        (lambda: EvaluateConfig(every=-1), "0 or more"),
        (lambda: SampleConfig(every=5), "give a prompt"),
        (lambda: RunConfig(profile="10"), "run.profile is '10'; use FIRST:LAST"),
        (lambda: RunConfig(profile="5:3"), "use FIRST:LAST"),
        (lambda: RunConfig(profile="0:3"), "use FIRST:LAST"),
        (lambda: RunConfig(layer_stats_every=-1), "run.layer-stats-every is -1"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep is 0"),
        (lambda: TransformerConfig(width=250), "not a multiple of model.heads 4"),
        (lambda: TransformerConfig(heads=4, kv_heads=3), "not a multiple of model.kv-heads 3"),
        (lambda: TransformerConfig(layers=3, window=(8, 0)), "do not divide model.layers 3"),
        (lambda: TransformerConfig(logit_softcap=-3.0), "model.logit-softcap is -3.0"),
        (lambda: TransformerConfig(attention_softcap=-3.0), "model.attention-softcap is -3.0"),
        (lambda: TransformerConfig(head_dim=-4), "model.head-dim is -4"),
        (lambda: TransformerConfig(kv_heads=-2), "model.kv-heads is -2"),
        (lambda: TransformerConfig(norm_epsilon=-1.0), "model.norm-epsilon is -1.0"),
    ],
)
def test_what_is_refused(make, said):
    with pytest.raises(ConfigError) as error:
        make()
    assert said in str(error.value)


def float_fields(value, path=()):
    """The path of every float of a config, nested ones too."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from float_fields(inner, (*path, field.name))
        elif isinstance(inner, float):
            yield (*path, field.name)


def with_value(value, path, new):
    inner = with_value(getattr(value, path[0]), path[1:], new) if len(path) > 1 else new
    return dataclasses.replace(value, **{path[0]: inner})


FLOATS = list(float_fields(Config("test", TransformerConfig())))


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("path", FLOATS, ids=".".join)
def test_no_field_takes_what_is_no_finite_number(path, number):
    with pytest.raises(ConfigError, match=path[-1].replace("_", "-")):
        with_value(Config("test", TransformerConfig()), path, number)


def test_the_floats_of_a_config_are_found():
    assert {("optim", "learning_rate"), ("model", "rope", "theta"), ("train", "z_loss")} <= set(FLOATS)


@pytest.mark.parametrize("weight", ["inf", "nan", "-inf", "0", "-1", "1e400"])
def test_a_weight_is_positive_and_finite(weight):
    with pytest.raises(ConfigError, match=r"data source 'a' has weight .*; weights are positive and finite"):
        SourceConfig("a", float(weight))


def test_a_model_without_a_task_says_so():
    with pytest.raises(TypeError, match=r"override task\(config\)"):
        ModelConfig().task(config())


# How they print, hash and differ


def test_text_has_a_line_per_field():
    lines = to_text(config(mesh=MeshConfig(tensor=2), phases=(PhaseConfig(5),))).splitlines()
    assert 'model.kind = "TransformerConfig"' in lines
    assert "mesh.tensor = 2" in lines
    assert "mesh.data = null" in lines
    assert 'phases = [{"start": 5, "sequence": 0, "batch": 0, "mixture": []}]' in lines
    assert len(lines) == len(flatten(to_dict(config())))


def test_hash_follows_what_is_computed_not_where():
    base = config_hash(config())
    same = [
        config(steps=7),
        config(mesh=MeshConfig(tensor=2)),
        config(devices=8),
        config(run=RunConfig(dir="elsewhere")),
        config(data=DataConfig(cache="there")),
        config(checkpoint=CheckpointConfig(every=5)),
    ]
    others = [
        config(seed=1),
        config(data=DataConfig(path="other")),
        config(data=DataConfig(batch=16)),
        config(optim=OptimConfig(learning_rate=1e-3)),
        Config("test", TransformerConfig(layers=2)),
        Config("other", TransformerConfig()),
    ]
    assert {config_hash(c) for c in same} == {base}
    assert len({base, *(config_hash(c) for c in others)}) == 1 + len(others)


def test_diff_names_the_fields():
    old, new = to_dict(config()), to_dict(config(seed=3, optim=OptimConfig(b1=0.5)))
    assert diff(old, new) == ["optim.b1: 0.9 -> 0.5", "seed: 0 -> 3"]
    assert diff(old, old) == []
    del new["seed"]
    assert diff(old, new)[-1] == 'seed: 0 -> "(absent)"'
