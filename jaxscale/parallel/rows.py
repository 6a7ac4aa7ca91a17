"""A schedule table as the arrays that the runtime's program indexes: what a stage does in a tick, and where.

Pure. Read next: `pipeline.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxscale.parallel.buffers import gradient_slots, input_slots
from jaxscale.parallel.schedules import Kind, Op, Table


class Row(NamedTuple):
    """What a stage does in a tick, as numbers: (ticks, stages) int32. -1 = nothing, or nothing comes."""

    forward: Any
    """Chunk of the forward among the stage's own, and its microbatch and slot of its input."""
    forward_microbatch: Any
    forward_input: Any
    backward: Any
    backward_microbatch: Any
    backward_input: Any
    backward_gradient: Any
    backward_kind: Any
    weight: Any
    weight_microbatch: Any
    weight_input: Any
    weight_gradient: Any
    input_comes: Any
    """Slot for what the stage before sent in the tick before."""
    gradient_comes: Any


def rows(table: Table) -> Row:
    """The table as arrays. Pure."""
    inputs, gradients = input_slots(table), gradient_slots(table)
    found = {name: np.full((len(table.ticks), table.stages), -1, np.int32) for name in Row._fields}
    for t, tick in enumerate(table.ticks):
        for s, work in enumerate(tick):
            for op in work:
                _write(found, t, s, op, table, inputs.of, gradients.of)
    return Row(**found)


def _write(
    found: dict[str, np.ndarray],
    t: int,
    s: int,
    op: Op,
    table: Table,
    inputs: dict[tuple[int, int], int],
    gradients: dict[tuple[int, int], int],
) -> None:
    name = {Kind.FORWARD: "forward", Kind.BACKWARD_WEIGHT: "weight"}.get(op.kind, "backward")
    own = (op.chunk, op.microbatch)
    found[name][t, s] = op.chunk // table.stages
    found[f"{name}_microbatch"][t, s] = op.microbatch
    found[f"{name}_input"][t, s] = inputs.get(own, -1)
    if name != "forward":
        found[f"{name}_gradient"][t, s] = gradients.get(own, -1)
    if name == "backward":
        found["backward_kind"][t, s] = op.kind
    if name == "forward" and op.chunk < table.depth - 1:
        found["input_comes"][t + 1, (s + 1) % table.stages] = inputs[op.chunk + 1, op.microbatch]
    if name == "backward" and op.chunk > 0:
        found["gradient_comes"][t + 1, (s - 1) % table.stages] = gradients[op.chunk - 1, op.microbatch]
