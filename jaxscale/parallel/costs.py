"""What a pipeline schedule costs: in lockstep, as our runtime executes it, and if every stage went as soon as it can.

The runtime moves activations once a tick, and nobody begins the next tick before the slowest is done with this one. So
a table costs the sum over its ticks of the slowest stage's work, and is best when the ops of a tick take equally long.
Pure. Read next: `buffers.py`, what it keeps, and `pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from jaxscale.parallel.schedules import (
    Kind,
    Op,
    Order,
    ScheduleError,
    Table,
    in_pairs,
    make_orders,
    needs,
    one_at_a_time,
)


@dataclass(frozen=True)
class OpCosts:
    """Seconds, or any unit, that a microbatch takes on a stage (all of its chunks together)."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    recompute: float = 0.0
    """Of the forward pass, before each backward op: 0 where activations are kept, `forward` where none is."""
    shares: tuple[float, ...] = ()
    """How much more than that each chunk of the model takes, 1 = as said; empty: all alike."""

    def of(self, op: Op, chunks: int) -> float:
        """Seconds of one op, which is of one chunk."""
        backward = self.recompute + self.backward_input
        seconds = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: backward + self.backward_weight,
            Kind.BACKWARD_INPUT: backward,
            Kind.BACKWARD_WEIGHT: self.recompute + self.backward_weight,
        }[op.kind]
        return seconds / chunks * (self.shares[op.chunk] if self.shares else 1.0)


UNIT = OpCosts(1.0, 0.5, 0.5)
"""A forward takes as long as a whole backward: the unit of the textbooks' bubbles."""


def lockstep_cost(table: Table, costs: OpCosts) -> float:
    """Seconds of a table: the sum over ticks of the stage that has most to do."""
    return sum(max(sum(costs.of(op, table.chunks) for op in work) for work in tick) for tick in table.ticks)


def busy(table: Table, costs: OpCosts) -> float:
    """Seconds of work in it, of all stages together."""
    return sum(costs.of(op, table.chunks) for tick in table.ticks for work in tick for op in work)


def bubble(table: Table, costs: OpCosts) -> float:
    """Share of the stages' time in lockstep in which they do nothing."""
    return 1.0 - busy(table, costs) / (table.stages * lockstep_cost(table, costs))


def asynchronous_cost(orders: Sequence[Order], costs: OpCosts, chunks: int = 1) -> float:
    """Seconds of the same work where each stage begins an op as soon as it is through with the one before and what it
    needs is there; moving it takes no time. Raises ScheduleError for orders that wait for one another.
    """
    stages = len(orders)
    depth = stages * chunks
    at, free = [0] * stages, [0.0] * stages
    done: dict[Op, float] = {}
    left = sum(len(order) for order in orders)
    while left:
        before = left
        for s in range(stages):
            while at[s] < len(orders[s]):
                op = orders[s][at[s]]
                if any(need not in done for need in needs(op, depth)):
                    break
                begin = max([free[s], *(done[need] for need in needs(op, depth))])
                free[s] = done[op] = begin + costs.of(op, chunks)
                at[s], left = at[s] + 1, left - 1
        if left == before:
            raise ScheduleError(f"the stages wait for one another: {left} ops cannot be done")
    return max(free)


def closed_form(name: str, stages: int, microbatches: int, chunks: int = 1) -> float:
    """The bubble that a schedule has in the literature: 1f1b and gpipe (S-1)/(M+S-1), interleaved (S-1)/(v M+S-1), and
    zero-bubble (S-1)/(3 M+S-1), where the halves of a backward take as long as a forward.
    """
    units = 3 * microbatches if name == "zero-bubble" else microbatches * chunks
    return (stages - 1) / (units + stages - 1)


def make_table(name: str, stages: int, microbatches: int, chunks: int = 1, costs: OpCosts = OpCosts()) -> Table:
    """The cheapest table in lockstep of those that this schedule can have. Raises ScheduleError."""
    candidates = [one_at_a_time(name, stages, microbatches, chunks)]
    if name in ("1f1b", "interleaved"):
        candidates.append(in_pairs(name, stages, microbatches, chunks))
    return min(candidates, key=lambda table: lockstep_cost(table, costs))


@dataclass(frozen=True)
class Choice:
    """One of the schedules that were compared."""

    name: str
    chunks: int
    lockstep: float
    asynchronous: float
    bubble: float
    """In lockstep."""


def compare(
    stages: int,
    microbatches: int,
    chunks: Sequence[int],
    costs: OpCosts,
    shares: Mapping[int, tuple[float, ...]] = MappingProxyType({}),
) -> list[Choice]:
    """All schedules that these sizes allow, the cheapest in lockstep first. shares: of `OpCosts`, by chunks a stage."""
    found = []
    for name, v in [("gpipe", 1), ("1f1b", 1), ("zero-bubble", 1), *(("interleaved", v) for v in chunks)]:
        if v not in chunks or (name == "interleaved") != (v > 1):
            continue
        own = replace(costs, shares=shares.get(v, costs.shares))
        try:
            table = make_table(name, stages, microbatches, v, own)
        except ScheduleError:
            continue  # these microbatches do not go with it
        asynchronous = asynchronous_cost(make_orders(name, stages, microbatches, v), own, v)
        found.append(Choice(name, v, lockstep_cost(table, own), asynchronous, bubble(table, own)))
    return sorted(found, key=lambda choice: (choice.lockstep, choice.chunks))


def partition(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Layers of each stage, in order, so that the slowest stage is as fast as can be.

    costs: of each layer; first, last: of what the first and the last stage do besides (embedding, head). Raises
    ScheduleError for fewer layers than stages. Of equally good ones the most even one is taken.
    """
    layers = len(costs)
    if layers < stages:
        raise ScheduleError(f"{layers} layers for {stages} stages: some would have none; use {layers} stages or fewer")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def stage_cost(stage: int, begin: int, end: int) -> float:
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        return sums[end] - sums[begin] + extra

    # best[end] = (slowest, sum of squares, layers of each stage) of the first stages that hold the first `end` layers.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            options = []
            for begin, (slowest, squares, sizes) in best.items():
                if begin < end:
                    cost = stage_cost(stage, begin, end)
                    options.append((max(slowest, cost), squares + cost**2, (*sizes, end - begin)))
            if options:
                following[end] = min(options)
        best = following
    return best[layers][2]
