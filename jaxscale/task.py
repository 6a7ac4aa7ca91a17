"""What the trainer knows of a model, and nothing more.

A task is pure functions over one nested dict of parameters. The trainer imports no model; models import no trainer.
Losses and metrics are *sums over tokens (or examples) weighted by `loss_weight`*; the step divides by the global
weight once, which makes the mean independent of microbatches, padding and the number of processes. Read next:
`models/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jax

if TYPE_CHECKING:
    from jaxscale.checkpoint.stored_layout import StoredLayout
    from jaxscale.config import PipelineConfig
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
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    scale: float = 0.02
    matrix_dims: tuple[int, int] | None = None
    sparse: bool = False


class Task(Protocol):
    """A trainable problem. All methods are pure; `loss` is traced."""

    def __hash__(self) -> int:
        """Programs are kept by their task."""
        ...

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Flat table: path -> Parameter."""
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

        key: of this step, for dropout and the like, to be folded with `batch["row"]`; None = evaluation, no randomness.
        """
        ...

    def flops_per_token(self, sequence: int) -> float:
        """Model FLOPs of forward and backward per trained token (or example) at this sequence length, none repeated."""
        ...


class LayeredTask(Task, Protocol):
    """A task that is a stack of layers between a beginning and an end, so that pipeline stages can share it.

    `params["layers"]` has the layers stacked; everything else is used by `begin` and `end` alone.
    """

    @property
    def pipeline(self) -> PipelineConfig:
        """How stages take turns."""
        ...

    def arrange(self, batch: Batch) -> Batch:
        """The batch as the layers want it; called once for all of it, or for all its microbatches (M, B, ...)."""
        ...

    def begin(self, params: Params, batch: Batch) -> jax.Array:
        """What goes into the first layer: the residual stream (B, S, D)."""
        ...

    def through(
        self, layers: Params, x_BSD: jax.Array, batch: Batch, key: jax.Array | None, first: jax.Array | int
    ) -> jax.Array:
        """The residual stream behind some layers in a row, of which the first is layer `first` of the model."""
        ...

    def end(self, params: Params, x_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of what comes out of the last layer: the same sums as `loss`."""
        ...
