"""Embedding tables in a training step: looked up before the loss, updated row by row after it, never differentiated.

The loss gets the pooled bags of a batch beside it (`bags/NAME`), and gradients are taken of the bags. So a table has no
gradient array, no optimizer state but its accumulator, and lies apart from the dense weights in the state:

    tables/weights/NAME    tables/accumulator/NAME        NAME: the placement, see parallel/table_layout.py

Read next: `parallel/table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import axes
from jaxscale.host_memory import in_memory_of
from jaxscale.optim.sparse import SparseRule
from jaxscale.parallel.table import Counts, TableGroup
from jaxscale.task import Batch, Parameter, Params, Task

TABLES = "tables"
"""Entry of a state, and of `params` where a task evaluates."""
BAGS = "bags/"
"""Prefix of what a batch gets: pooled bags, by name."""
ACCUMULATOR = "accumulator"


@dataclass(frozen=True)
class Tables:
    """All tables of a task. `order`: see `make_groups`; `rate`: peak learning rate, whose schedule is the run's."""

    groups: tuple[TableGroup, ...]
    order: tuple[int, ...]
    rule: SparseRule
    rate: float

    @property
    def parameters(self) -> dict[str, Parameter]:
        """By path, for the audit and for people; the optimizer of the dense weights leaves them out."""
        return {f"{TABLES}/{group.placement}": group.parameter for group in self.groups}

    def look_up(self, weights: Mapping[str, jax.Array], ids_BH: jax.Array) -> tuple[dict[str, jax.Array], Counts]:
        """Bags (B, F, D) by name, and the counts of all exchanges together."""
        bags: dict[str, jax.Array] = {}
        counts: Counts = {}
        for group in self.groups:
            bags[group.placement], own = group.look_up(weights[group.placement], ids_BH)
            counts = {name: counts.get(name, 0) + value for name, value in own.items()}
        return bags, counts

    def joined(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The bags of all features in the model's order, (B, F, D) sharded P(batch, None, tensor)."""
        parts = [batch[BAGS + group.placement] for group in self.groups]
        if len(parts) == 1:
            return parts[0]
        spec = axes.spec("act_batch", None, "table_width")
        return jnp.concatenate(parts, axis=1).at[:, jnp.array(self.order)].get(out_sharding=spec)

    def slots(self, weights: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Accumulators before the first step: zeros, float32; empty for rules without."""
        dims = self.rule.slot_dims()
        if dims is None:
            return {}
        made = {}
        for group in self.groups:
            names = group.slot_axes(dims)
            shape = weights[group.placement].shape[: len(names)]
            made[group.placement] = jnp.zeros(shape, jnp.float32, out_sharding=axes.spec(*names))
        return {ACCUMULATOR: made}

    def update(
        self, tables: Mapping[str, Any], ids_BH: jax.Array, gradients: Mapping[str, jax.Array], rate: jax.Array
    ) -> dict[str, Any]:
        """The `tables` entry of the state after one update. gradients: of the bags, by name."""
        weights, slots = {}, {}
        for group in self.groups:
            name = group.placement
            slot = tables[ACCUMULATOR][name] if ACCUMULATOR in tables else None
            weights[name], slot = group.update(self.rule, tables["weights"][name], slot, ids_BH, gradients[name], rate)
            if slot is not None:
                slots[name] = slot
        return {"weights": weights, **({ACCUMULATOR: slots} if slots else {})}


def init_tables(task: Task, params: Params) -> tuple[Params, dict[str, Any]]:
    """Splits what `task.init` made into the dense weights and the `tables` entry of a state ({} without)."""
    if task.tables is None:
        return params, {}
    weights = params[TABLES]
    dense = {name: value for name, value in params.items() if name != TABLES}
    return dense, {TABLES: {"weights": weights, **task.tables.slots(weights)}}


def weights_of(state: Mapping[str, Any]) -> Params:
    """What an evaluation uses: the moving average where the run keeps one, else the weights, and the tables.

    An average that is kept in the hosts' memory comes to where the weights are, until its evaluation has ended.
    """
    params: Params = in_memory_of(state["params"], state["ema"]) if "ema" in state else state["params"]
    return {**params, TABLES: state[TABLES]["weights"]} if TABLES in state else params


def look_up_tables(task: Task, state: Mapping[str, Any], batch: Batch) -> tuple[dict[str, jax.Array], Counts]:
    """The bags of the whole batch and the counts of their exchange; nothing for a task without tables."""
    if task.tables is None:
        return {}, {}
    return task.tables.look_up(state[TABLES]["weights"], batch["ids"])


def with_bags(batch: Batch, bags: Mapping[str, jax.Array]) -> Batch:
    """The batch as the loss gets it."""
    return {**batch, **{BAGS + name: value for name, value in bags.items()}}


def update_tables(
    task: Task,
    state: Mapping[str, Any],
    batch: Batch,
    gradients: Mapping[str, jax.Array],
    accepted: jax.Array,
    share: jax.Array,
) -> dict[str, Any]:
    """The `tables` entry of the new state, as part of one; {} for a task without tables.

    gradients: of the bags, clipped; share: of the peak learning rate. Where the update is not accepted, the batch is
    taken to have no ids: no row is touched. (Choosing between old and new tables would keep both.)
    """
    if task.tables is None:
        return {}
    ids_BH = jnp.where(accepted, batch["ids"], -1)
    return {TABLES: task.tables.update(state[TABLES], ids_BH, gradients, task.tables.rate * share)}
