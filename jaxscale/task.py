"""What the trainer knows of a model, and nothing more.

A task is pure functions over one nested dict of parameters. The trainer imports no model; models import no trainer.
Losses and metrics are *sums over tokens (or examples) weighted by `loss_weight`*; the step divides by the global
weight once, which makes the mean independent of microbatches, padding and the number of processes. Read next:
`models/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import jax

if TYPE_CHECKING:
    from jaxscale.checkpoint.stored_layout import StoredLayout
    from jaxscale.config import PipelineConfig
    from jaxscale.parallel.division import Division
    from jaxscale.train.tables import Tables

Params = dict[str, Any]  # nested dict of arrays; a parameter's path joins the keys with "/"
Batch = Mapping[str, jax.Array]
"""loss_weight: (B, S) of tokens or (B,) of examples, row: (B,), and what else the model's rows have (`data/source.py`).
Text: tokens, targets, segment_ids, positions, all (B, S)."""


@dataclass(frozen=True)
class Parameter:
    """One parameter before it exists.

    `shape`: global shape; `axes`: one logical axis (or None) per dim, see `axes.py`; `init`: how it starts;
    `scale`: standard deviation for `normal`. `matrix_dims`: for weights that act as one matrix, how many trailing dims
    form its (inputs, outputs) sides, e.g. (1, 2) for attention's (width, heads, head_dim); None for everything else.
    `sparse`: an embedding table, updated row by row and not by the optimizer of the dense weights.
    `sign_step`: above 0, each step moves the parameter by this against the sign of its gradient, whatever the optimizer
    and its learning rate are; it is float32, and its gradient is no part of any norm.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    scale: float = 0.02
    matrix_dims: tuple[int, int] | None = None
    sparse: bool = False
    sign_step: float = 0.0


PER_LAYER = "layers/"
"""Prefix of metrics that have a number, or an array, for each layer."""


LOAD = PER_LAYER + "load"
"""Metric of models with experts, (layers, experts): how many times a token goes to each, in the mean."""


class LayerSums(NamedTuple):
    """What layers add to the sums of a batch: to the loss that is differentiated (None = nothing), and metrics.

    metrics: float32 scalars, summed over layers; under names that begin with PER_LAYER arrays (layers, ...), or of one
    layer (...).
    """

    loss: jax.Array | None
    metrics: dict[str, jax.Array]


NOTHING = LayerSums(None, {})
"""Of a layer that adds none."""


class Task(Protocol):
    """A trainable problem. All methods are pure; `loss` is traced."""

    def __hash__(self) -> int:
        """Programs are kept by their task."""
        ...

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Flat table: path -> Parameter, of the model; a program may have padding beside (`stored_layout`)."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids that the task accepts: 0 to vocabulary - 1."""
        ...

    @property
    def tables(self) -> Tables | None:
        """Embedding tables, which are looked up and updated row by row; None: all parameters are dense.

        With tables `init` returns them under `tables`, and `loss` gets them there or their bags in the batch.
        """
        ...

    @property
    def stored_layout(self) -> StoredLayout | None:
        """How checkpoints have the state; None: as the program has it."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, sharded by the rules; the same values on every mesh."""
        ...

    def loss(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted *sums* over the batch: the loss to differentiate and a dict of float32 scalars (`loss` among them).

        Metrics whose names begin with PER_LAYER are arrays (layers, ...).

        key: of this step, for dropout and the like, to be folded with `batch["row"]`; None = evaluation, no randomness.
        """
        ...

    def flops_per_token(self, sequence: int) -> float:
        """Model FLOPs of forward and backward per trained token (or example) at this sequence length, none repeated."""
        ...


class LayeredTask(Task, Protocol):
    """A task that is a stack of layers between a beginning and an end, so that pipeline stages can share it.

    `params["layers"]` has the layers stacked, with the padding that `division` says; everything else is used by `begin`
    and `end` alone.
    """

    @property
    def pipeline(self) -> PipelineConfig:
        """How stages take turns."""
        ...

    @property
    def division(self) -> Division:
        """How many layers each chunk of the current mesh's stages has."""
        ...

    def arrange(self, batch: Batch) -> Batch:
        """The batch as the layers want it; called once for all of it, or for all its microbatches (M, B, ...)."""
        ...

    def begin(self, params: Params, batch: Batch) -> jax.Array:
        """What goes into the first layer: the residual stream (B, S, D)."""
        ...

    def through(
        self, layers: Params, x_BSD: jax.Array, batch: Batch, key: jax.Array | None, first: jax.Array | int
    ) -> tuple[jax.Array, LayerSums]:
        """The residual stream behind some layers in a row, of which the first is layer `first` of the model, and what
        these layers add to the sums.
        """
        ...

    def end(self, params: Params, x_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of what comes out of the last layer: the same sums as `loss`."""
        ...
