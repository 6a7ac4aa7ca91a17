"""Where a pipeline stage keeps what waits in it: a slot for each activation and gradient, found before the run.

What a stage got or made is needed until its last use, some ticks later. Slots are given to these lifetimes as registers
are: as soon as one is free it is used again, so that a buffer has as many slots as there are things alive at once. All
stages run one program, so the stage that keeps most decides how many. Pure. Read next: `pipeline.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxscale.parallel.schedules import Kind, Op, Table

Key = tuple[int, int]
"""Chunk and microbatch."""
BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


@dataclass(frozen=True)
class Slots:
    """Slots of one buffer: of chunks' inputs, or of the gradients of chunks' outputs."""

    count: int
    """Of each stage; at least 1."""
    of: dict[Key, int]
    """What is kept -> its slot."""


def input_slots(table: Table) -> Slots:
    """For the inputs of all chunks but the first, whose input is made from the tokens whenever it is wanted.

    An input arrives in the tick after the forward of the chunk before, and is needed until the last backward op.
    """
    when = table.when()
    lives = {}
    for op, tick in when.items():
        if op.kind is Kind.FORWARD and op.chunk:
            arrives = when[Op(Kind.FORWARD, op.chunk - 1, op.microbatch)] + 1
            last = max(when.get(Op(kind, op.chunk, op.microbatch), tick) for kind in Kind)
            lives[op.chunk, op.microbatch] = (arrives, last)
    return _allocate(table, lives)


def gradient_slots(table: Table) -> Slots:
    """For the gradients of chunks' outputs. That of the last chunk comes from the loss, in the same tick: it is kept
    only where the weights' half wants it later.
    """
    when = table.when()
    lives = {}
    for op, tick in when.items():
        last = when.get(Op(Kind.BACKWARD_WEIGHT, op.chunk, op.microbatch), tick)
        if op.kind in BACKWARDS and op.chunk < table.depth - 1:
            lives[op.chunk, op.microbatch] = (when[Op(op.kind, op.chunk + 1, op.microbatch)] + 1, last)
        elif op.kind is Kind.BACKWARD_INPUT:
            lives[op.chunk, op.microbatch] = (tick, last)
    return _allocate(table, lives)


def peak_live(table: Table) -> tuple[int, ...]:
    """Stage -> how many microbatches of its chunks it has begun forward and not ended backward, at most."""
    last = Kind.BACKWARD_WEIGHT if any(op.kind is Kind.BACKWARD_WEIGHT for op in table.when()) else Kind.BACKWARD
    peaks = []
    for s in range(table.stages):
        live = peak = 0
        for tick in table.ticks:
            for op in tick[s]:
                live += (op.kind is Kind.FORWARD) - (op.kind is last)
                peak = max(peak, live + (op.kind is last))
        peaks.append(peak)
    return tuple(peaks)


def _allocate(table: Table, lives: dict[Key, tuple[int, int]]) -> Slots:
    """Each lifetime, the earliest first, gets the lowest slot of its stage that is free; ends are inclusive."""
    found: dict[Key, int] = {}
    until: list[list[int]] = [[] for _ in range(table.stages)]
    for key, (arrives, last) in sorted(lives.items(), key=lambda item: (item[1], item[0])):
        slots = until[key[0] % table.stages]
        slot = next((i for i, end in enumerate(slots) if end < arrives), len(slots))
        if slot == len(slots):
            slots.append(last)
        slots[slot] = last
        found[key] = slot
    return Slots(max(1, *(len(slots) for slots in until)), found)
