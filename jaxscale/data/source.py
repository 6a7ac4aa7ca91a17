"""What a run asks of its data, whatever the rows are: text (`corpora.py`), examples with clicks (`clicks.py`).

A row is known by its global number alone: any process reads any row of any step, and the position of a run is one
integer. Read next: `loader.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from jaxscale.config import Config
    from jaxscale.data.position import Phase
    from jaxscale.data.tokenizer import Tokenizer
    from jaxscale.task import Task

Rows = dict[str, np.ndarray]
"""Arrays of some rows, on the host."""


class RowArray(NamedTuple):
    """One array of a batch: its dims behind the rows, its dtype, and how all of it is sharded."""

    shape: tuple[int, ...]
    dtype: str
    spec: P


Layout = Mapping[str, RowArray]
"""The arrays of a batch by name; `loss_weight` and `row` are always there."""


def abstract_batch(layout: Layout, rows: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `rows` rows as shapes, dtypes and shardings."""
    return {
        name: jax.ShapeDtypeStruct((rows, *one.shape), one.dtype, sharding=NamedSharding(mesh, one.spec))
        for name, one in layout.items()
    }


class StepSource(Protocol):
    """Random access by step: element n = the rows of step n that some devices need. Made of NumPy alone."""

    @property
    def specs(self) -> Mapping[str, P]:
        """How each array of a batch is sharded."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Rows: ...

    def span(self, step: int) -> tuple[int, int]:
        """First global row of the step, and how many rows it has."""
        ...

    def padded(self, step: int) -> int:
        """Rows of the step's arrays on the devices."""
        ...


class Held(Protocol):
    """How much is held out for evaluation."""

    @property
    def documents(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Or examples: 0 = nothing to evaluate."""
        ...


class Source(Protocol):
    """The open data of a run."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: the rows are no text."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides which values a row has, apart from the config; JSON-safe, equal on all hosts."""
        ...

    def check_identity(self, saved: Mapping[str, Any], step: int = 1) -> None:
        """Raises DataError where a checkpoint of `step` updates was trained on other data."""
        ...

    def check_task(self, task: Task) -> None:
        """Raises DataError where the model cannot read these rows."""
        ...

    def length(self, phase: Phase) -> int:
        """Tokens or examples that a pass over the data of a phase trains on."""
        ...

    def step_rows(self, config: Config, mesh: Mesh, devices: Collection[jax.Device]) -> StepSource:
        """The rows that these devices need."""
        ...

    def held_out(self) -> Held: ...

    def evaluation_batches(self, config: Config, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
        """Batches of all that is held out, on the devices."""
        ...

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """From sums over all evaluation batches to `eval_` figures."""
        ...
