"""The configuration of a run: nested frozen dataclasses of scalars, strings and tuples.

A recipe's `config()` returns a `Config`; the command line overrides fields (`--optim.learning-rate 3e-4`); nothing else
configures a run. Because everything is frozen and plain, a config prints, diffs and hashes. Each class checks itself in
`__post_init__` and says what is wrong, why, and how to fix it. Read next: `mesh.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from jaxscale.checkpoint.checkpoint_config import CheckpointConfig
from jaxscale.config_error import ConfigError as ConfigError
from jaxscale.config_error import require as _require

# What a whole config can be turned into is found here too.
from jaxscale.config_tree import PLACEMENT, config_hash, diff, flatten, not_finite, to_dict, to_text  # noqa: F401 - passed on
from jaxscale.model_config import ModelConfig
from jaxscale.parallel.across_config import AcrossConfig
from jaxscale.parallel.local_config import LocalConfig
from jaxscale.remat_config import RematConfig as RematConfig
from jaxscale.state_config import StateConfig

EARLY = "early"
"""`run.profile` of some early steps, wherever a start begins."""
EMULATED_DEVICES = 4096
"""At most; each costs the process memory and threads."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the six mesh axes, outer (slow links) to inner (fast links); None = not set here.

    Unset axes are 1, except that `data` takes the slices and `fsdp` absorbs the devices that are left.
    """

    stage: int | None = None  # Pipeline stages.
    data: int | None = None  # Copies of the weights: slices, over the network between them.
    fsdp: int | None = None  # Devices that share the weights and the optimizer state.
    expert: int | None = None  # Groups of experts.
    context: int | None = None  # Parts of a sequence.
    tensor: int | None = None  # Parts of each matrix product, over the fastest links.

    def __post_init__(self) -> None:
        for axis in dataclasses.fields(self):
            size = getattr(self, axis.name)
            _require(size is None or size >= 1, f"mesh.{axis.name} is {size}; an axis has at least size 1")


@dataclass(frozen=True)
class SourceConfig:
    """One corpus of a mixture: a text file, folder, glob or built token folder, and its share of the rows."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require(bool(self.path), "a data source has an empty path; give a file, a folder or a built token folder")
        is_share = 0 < self.weight < math.inf
        _require(is_share, f"data source {self.path!r} has weight {self.weight}; weights are positive and finite")


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from. `path` is one corpus; `mixture` is several with weights (then `path` is left empty)."""

    path: str = ""
    """File, folder, glob or fsspec address of text, a built token folder, `builtin`, or a folder of clicks."""
    mixture: tuple[SourceConfig, ...] = ()
    """Several corpora in place of data.path, each with its share of the rows (1 where none is given)."""
    tokenizer: str = "bytes"
    """`bytes` (256 byte values and one end-of-document token) or the path of a `tokenizer.json`."""
    end_of_document: str = ""
    """Name of the token that ends a document; empty: found by its usual names."""
    text_field: str = "text"
    """Name of the text column in jsonl and Parquet."""
    sequence: int = 256
    """Tokens per row."""
    batch: int = 8
    """Rows per optimizer step, over all devices and microbatches."""
    shuffle: bool = True
    """Draw rows in random order, anew in each pass; without, they come in the order of the files."""
    held_out_documents: int = 0
    """Documents of each corpus kept for evaluation, chosen by a fixed hash; of click logs the last so many rows."""
    cache: str = ""
    """Folder of built token files; empty: the user's cache folder."""
    prefetch: int = 4
    """Batches prepared ahead of the step."""

    def __post_init__(self) -> None:
        _require(self.sequence >= 2, f"data.sequence is {self.sequence}; a row needs at least 2 tokens")
        _require(self.batch >= 1, f"data.batch is {self.batch}; a step needs at least 1 row")
        _require(self.held_out_documents >= 0, f"data.held-out-documents is {self.held_out_documents}; use 0 or more")
        _require(self.prefetch >= 1, f"data.prefetch is {self.prefetch}; use 1 or more")
        _require(
            not (self.path and self.mixture),
            "data.path and data.mixture are both set; a single corpus goes into path, several into mixture",
        )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        return self.mixture if self.mixture else (SourceConfig(self.path),) if self.path else ()


@dataclass(frozen=True)
class PhaseConfig:
    """A change of data from optimizer step `start` (0 = the first) on; zero or empty keeps the previous value."""

    start: int
    sequence: int = 0
    batch: int = 0
    mixture: tuple[SourceConfig, ...] = ()

    def __post_init__(self) -> None:
        _require(self.start >= 1, f"a phase starts at step {self.start}; the run itself is the phase from step 0")
        fits = self.sequence >= 0 and self.sequence != 1 and self.batch >= 0
        _require(
            fits,
            f"the phase from step {self.start} has sequence {self.sequence} and batch {self.batch}; a row needs at "
            "least 2 tokens and a step 1 row, and 0 keeps the value before",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and everything that touches the gradient."""

    name: Literal["adamw", "muon", "adafactor", "sgd"] = "adamw"
    """Update rule; muon takes AdamW for what is not a hidden matrix."""
    learning_rate: float = 3e-4
    """Peak learning rate (for muon: of the matrices)."""
    adam_learning_rate: float = 3e-4
    """muon only: peak learning rate of what is not a hidden matrix (embeddings, head, norms)."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """Learning rate after the warmup: constant, a half cosine, or constant with a linear decay at the end."""
    warmup: int = 0
    """Steps of linear warmup."""
    decay: float = 0.2
    """wsd only: share of the steps in the final decay."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled; applies to weights of two or more dims (norm scales are left alone)."""
    b1: float = 0.9  # AdamW: decay of the mean of the gradients.
    b2: float = 0.95  # AdamW: decay of the mean of their squares.
    epsilon: float = 1e-8  # AdamW: added to the root of that mean.
    momentum: float = 0.95
    """Muon's and SGD's momentum."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 = off."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights; 0 = none kept."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "adam_learning_rate"):
            flag, value = name.replace("_", "-"), getattr(self, name)
            _require(value > 0, f"optim.{flag} is {value}; it must be positive")
            _require(value <= 1e4, f"optim.{flag} is {value}; with more than 10000 float32 weights overflow at once")
        _require(0 <= self.ema < 1, f"optim.ema is {self.ema}; a decay lies in [0, 1)")
        _require(0 <= self.final <= 1, f"optim.final is {self.final}; it is a share of the peak, in [0, 1]")
        _require(0 < self.decay <= 1, f"optim.decay is {self.decay}; it is a share of the steps, in (0, 1]")
        _require(self.warmup >= 0, f"optim.warmup is {self.warmup}; use 0 or more steps")
        _require(self.clip >= 0, f"optim.clip is {self.clip}; use 0 to turn clipping off")
        _require(self.weight_decay >= 0, f"optim.weight-decay is {self.weight_decay}; use 0 to turn decay off")
        _require(self.epsilon > 0, f"optim.epsilon is {self.epsilon}; a positive number keeps divisions finite")
        for name in ("b1", "b2", "momentum"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}; it lies in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """How a step is computed."""

    microbatches: int = 1
    """Parts of a batch that are computed one after the other; fixed for the run (row r is in part r mod this)."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the logits (PaLM, section 5)."""
    loss_chunk: int = 0
    """Tokens per device whose float32 logits exist at once; 0 = chosen from the vocabulary."""
    noise_scale: bool = False
    """Measure the gradient-noise scale (needs microbatches >= 2)."""
    spike_window: int = 128
    """Losses kept for the spike score (robust z of the loss); all but the oldest 10 are compared with."""
    skip_spikes_above: float = 0.0
    """Skip updates whose spike score is above this, 8 in a row at most (then it is a new level); 0 = never."""

    def __post_init__(self) -> None:
        _require(self.microbatches >= 1, f"train.microbatches is {self.microbatches}; use 1 or more")
        _require(
            self.spike_window >= 8, f"train.spike-window is {self.spike_window}; the median needs at least 8 steps"
        )
        _require(
            not self.noise_scale or self.microbatches >= 2,
            "train.noise-scale compares microbatches with the whole batch; set train.microbatches to 2 or more",
        )
        for name in ("z_loss", "loss_chunk", "skip_spikes_above"):
            flag, value = name.replace("_", "-"), getattr(self, name)
            _require(value >= 0, f"train.{flag} is {value}; use 0 or more")


@dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes. Weights are stored in `weights`, matmuls run in `compute`, gradients are summed in `reduce`.

    Optimizer state and moving averages are always float32.
    """

    compute: Literal["bfloat16", "float32"] = "bfloat16"  # Of matrix products and activations.
    weights: Literal["bfloat16", "float32"] = "float32"  # Of the stored weights.
    reduce: Literal["bfloat16", "float32"] = "float32"  # Of gradients while they are summed over devices.
    matmul: Literal["compute", "int8", "fp8"] = "compute"  # Operands of the layers' products: see ops/quantised.py.


@dataclass(frozen=True)
class PipelineConfig:
    """How the stages of a pipeline (mesh.stage > 1) take turns. Without one nothing of it is used."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """`jaxscale.parallel.schedules` says what each is."""
    chunks: int = 1
    """Pieces of the model on each stage; more than one needs `interleaved`."""
    layers: tuple[int, ...] = ()
    """Layers of each piece, in the model's order: piece q is on stage q mod mesh.stage; none given = all alike."""

    def __post_init__(self) -> None:
        _require(self.chunks >= 1, f"pipeline.chunks is {self.chunks}; a stage has 1 or more")
        _require(
            self.chunks == 1 or self.schedule == "interleaved",
            f"pipeline.chunks is {self.chunks}, and the schedule {self.schedule} has one chunk a stage; set "
            "pipeline.schedule to interleaved, or pipeline.chunks to 1",
        )
        _require(
            min(self.layers, default=1) >= 1,
            f"pipeline.layers is {' '.join(map(str, self.layers))}; each piece of the model has 1 layer or more",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = 0
    """Steps between evaluations; 0 = only at the end (if documents are held out)."""
    batches: int = 0
    """Batches per evaluation; 0 = all that is held out."""

    def __post_init__(self) -> None:
        _require(self.every >= 0 and self.batches >= 0, "evaluate.every and evaluate.batches are 0 or more")


@dataclass(frozen=True)
class SampleConfig:
    """Text generated during training, written to samples.jsonl."""

    every: int = 0
    """Steps between samples; 0 = never."""
    prompt: str = ""  # Text that the samples continue.
    tokens: int = 64  # Tokens of a sample.
    temperature: float = 0.8  # Divides the logits; 0 = always the likeliest token.

    def __post_init__(self) -> None:
        _require(self.every == 0 or bool(self.prompt), "sample.every is set but sample.prompt is empty; give a prompt")
        _require(self.tokens >= 1, f"sample.tokens is {self.tokens}; a sample has at least 1 token")
        _require(self.temperature >= 0, f"sample.temperature is {self.temperature}; use 0 (greedy) or more")


@dataclass(frozen=True)
class MemoryConfig:
    """Checkpoints in the memory of the hosts, under a supervisor (`jaxscale launch`)."""

    every: int | Literal["auto"] = "auto"
    """Steps between memory checkpoints; 0 = none; `auto`: from their measured cost and the failures so far."""
    replicas: int = 1
    """Hosts that hold a copy of each host's part: so many hosts may be lost at once without loss."""
    generations: int = 2
    """Checkpoints that each host keeps room for."""
    on_loss: Literal["shrink", "wait"] = "shrink"
    """What to do without a host that no spare replaces: go on with fewer, or wait for it."""

    def __post_init__(self) -> None:
        _require(
            self.every == "auto" or self.every >= 0, f"memory.every is {self.every}; use 0 (none) or more, or auto"
        )
        _require(0 <= self.replicas <= 3, f"memory.replicas is {self.replicas}; use 0 to 3")
        _require(2 <= self.generations <= 8, f"memory.generations is {self.generations}; use 2 to 8")


@dataclass(frozen=True)
class RunConfig:
    dir: str = ""
    """Run directory; empty: runs/<recipe>-<hash of the config>."""
    profile: str = ""
    """Steps to trace for xprof, as FIRST:LAST (for example 10:13), or `early`: some after each start; empty = none."""
    layer_stats_every: int = 0
    """Steps between per-layer statistics in metrics.jsonl; 0 = never."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Extra metric writers (need the `track` extra)."""
    compilation_cache: str = "auto"
    """Folder of compiled programs: `auto` (the user's cache folder), `off`, or a path."""

    def __post_init__(self) -> None:
        first, colon, last = self.profile.partition(":")
        _require(
            self.profile in ("", EARLY)
            or bool(colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)),
            f"run.profile is {self.profile!r}; use FIRST:LAST, for example 10:13, both steps of the run, or {EARLY}",
        )
        _require(self.layer_stats_every >= 0, f"run.layer-stats-every is {self.layer_stats_every}; use 0 or more")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    name: str  # Of the recipe; a run directory belongs to one.
    model: ModelConfig
    steps: int = 100
    """Optimizer steps of the whole run."""
    seed: int = 0  # Of weights, dropout and the order of rows.
    on: str = ""
    """Mesh file: a name in meshes/ (`v5e-256`) or a path; empty: the devices there are."""
    devices: int = 0
    """Emulate this many CPU devices; 0 = what there is (or what `on` says)."""
    init_from: str = ""
    """RUN@STEP (or RUN, its newest): start from the weights of another run's checkpoint."""
    init_map: tuple[str, ...] = ()
    """Weights that differ there: NEW=OLD, NEW= (stays as the seed makes it), =OLD (left out)."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[PhaseConfig, ...] = ()
    """Changes of data.sequence, data.batch or data.mixture from a step on."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    remat: RematConfig = field(default_factory=RematConfig)
    state: StateConfig = field(default_factory=StateConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    across: AcrossConfig = field(default_factory=AcrossConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for path, value in not_finite(to_dict(self)).items():
            raise ConfigError(f"{path.replace('_', '-')} is {value}; use a finite number")
        _require(self.steps >= 1, f"--steps is {self.steps}; a run has at least 1 step")
        _require(self.steps < 2**31, f"--steps is {self.steps}; the optimizer counts up to 2147483647")
        _require(self.devices >= 0, f"--devices is {self.devices}; use 0 for the devices there are")
        _require(
            self.devices <= EMULATED_DEVICES,
            f"--devices is {self.devices}; at most {EMULATED_DEVICES} CPU devices are emulated, real ones need no flag",
        )
        _require(bool(self.init_from) or not self.init_map, "--init-map says what --init-from loads; give that too")
        _require(0 <= self.seed < 2**32, f"--seed is {self.seed}; use 0 to 4294967295")
        first = self.run.profile.partition(":")[0]
        _require(
            not first.isdigit() or int(first) <= self.steps,
            f"run.profile is {self.run.profile!r}, but the run ends after step {self.steps}",
        )
        for setting, is_set in (
            ("across.gradients", self.across.keeps_residual),
            ("local.every", self.local.every > 0),
        ):
            _require(
                not (self.pipeline.layers and is_set),
                f"{setting} keeps arrays for each slice that have no place yet beside the padding of unequal pipeline "
                f"stages; leave pipeline.layers empty, or {setting} at its default",
            )
        starts = [phase.start for phase in self.phases]
        _require(starts == sorted(set(starts)), f"phases start at steps {starts}; give them in growing order")
        for batch in [self.data.batch, *(phase.batch for phase in self.phases if phase.batch)]:
            _require(
                batch % self.train.microbatches == 0,
                f"a batch of {batch} rows cannot be split into {self.train.microbatches} equal microbatches; "
                f"use train.microbatches of {_divisors(batch)}",
            )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
