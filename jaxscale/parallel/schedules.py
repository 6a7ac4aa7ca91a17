"""Pipeline schedules as pure tables: which stage does what in which tick. No JAX, no devices.

A model is cut into S * v *chunks* (S stages of v chunks each; chunk q is on stage q mod S), a batch into M
microbatches.
A schedule is first an order of work for each stage, and then a table: tick -> stage -> what it does in that tick.

    gpipe          all forwards, then all backwards (Huang et al. 2019, "GPipe")
    1f1b           a backward as soon as there is one (Narayanan et al. 2019, "PipeDream")
    interleaved    the same with v chunks a stage (Narayanan et al. 2021, "Efficient Large-Scale Training")
    zero-bubble    backward split into its input's and its weights' half (Qi et al. 2023, "Zero Bubble", ZB-H1)

One runtime executes any table; it moves activations once a tick, so all stages wait for the slowest of a tick. Read
next: `costs.py`, what that costs, and `pipeline.py`, the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


class Kind(IntEnum):
    """What a stage can do with a chunk and a microbatch."""

    FORWARD = 1
    BACKWARD = 2
    """Gradients of the chunk's input and weights at once."""
    BACKWARD_INPUT = 3
    """The gradient of the input alone: all that the stage before waits for."""
    BACKWARD_WEIGHT = 4
    """That of the weights, any time later."""


@dataclass(frozen=True, order=True)
class Op:
    """One piece of work."""

    kind: Kind
    chunk: int
    """0 .. S * v - 1, in the order of the layers."""
    microbatch: int


Order = tuple[Op, ...]
"""What one stage does, in this order."""
Tick = tuple[tuple[Op, ...], ...]
"""Stage -> what it does in a tick: at most a forward, then at most a backward, then at most a weights' half."""


class ScheduleError(ValueError):
    """A schedule that these stages and microbatches cannot have. The message says what to change."""


@dataclass(frozen=True)
class Table:
    """A schedule as the runtime executes it."""

    name: str
    stages: int
    chunks: int
    """Of each stage."""
    microbatches: int
    ticks: tuple[Tick, ...]

    @property
    def depth(self) -> int:
        """Chunks of the whole model."""
        return self.stages * self.chunks

    def when(self) -> dict[Op, int]:
        """Op -> its tick."""
        return {op: t for t, tick in enumerate(self.ticks) for work in tick for op in work}


def make_orders(name: str, stages: int, microbatches: int, chunks: int = 1) -> tuple[Order, ...]:
    """The order of work of each stage. Raises ScheduleError."""
    check_sizes(name, stages, microbatches, chunks)
    match name:
        case "gpipe":
            return tuple(
                (*_forwards(s, stages, microbatches, chunks), *_backwards(s, stages, microbatches, chunks))
                for s in range(stages)
            )
        case "1f1b" | "interleaved":
            return tuple(_one_by_one(s, stages, microbatches, chunks) for s in range(stages))
        case _:
            return _zero_bubble(stages, microbatches)


def check_sizes(name: str, stages: int, microbatches: int, chunks: int) -> None:
    """Raises ScheduleError where there is no such schedule."""
    if name not in SCHEDULES:
        raise ScheduleError(f"there is no pipeline schedule {name!r}; schedules are {', '.join(SCHEDULES)}")
    if stages < 1 or microbatches < 1 or chunks < 1:
        raise ScheduleError(f"stages ({stages}), microbatches ({microbatches}) and chunks ({chunks}) are 1 or more")
    if microbatches < stages:
        raise ScheduleError(
            f"{microbatches} microbatches for {stages} stages: {stages - microbatches} of them would always wait; use "
            f"{stages} microbatches or more (train.microbatches), best several times as many"
        )
    if name == "interleaved" and microbatches % stages:
        lower, upper = microbatches // stages * stages, -(-microbatches // stages) * stages
        raise ScheduleError(
            f"interleaved chunks take {stages} microbatches at a time, and {microbatches} is not a multiple of "
            f"{stages} stages; use {lower} or {upper}, or the schedule 1f1b"
        )
    if name in ("1f1b", "zero-bubble") and chunks > 1:
        raise ScheduleError(f"the schedule {name} has one chunk a stage, not {chunks}; interleaved has several")


def one_at_a_time(name: str, stages: int, microbatches: int, chunks: int = 1) -> Table:
    """Each stage does one thing a tick: the textbook's picture, in which every op takes one unit."""
    orders = make_orders(name, stages, microbatches, chunks)
    return Table(name, stages, chunks, microbatches, pack(orders))


def in_pairs(name: str, stages: int, microbatches: int, chunks: int = 1) -> Table:
    """A forward and a backward in each tick, as soon as both are there: no tick waits for a backward with only a
    forward to do meanwhile, so that ticks cost (v M + S - 1)(F + B) in all whatever a backward costs.

    The i-th forward of stage s is in tick s + i, its i-th backward in tick S v - 1 + (S - 1 - s) + i. For that a stage
    starts more forwards ahead than `1f1b` does, and keeps up to twice as many activations.
    """
    if name not in ("1f1b", "interleaved"):
        raise ScheduleError(f"only 1f1b and interleaved have ticks of a forward and a backward, not {name}")
    check_sizes(name, stages, microbatches, chunks)
    count, first = microbatches * chunks, stages * chunks - 1
    ticks: list[list[tuple[Op, ...]]] = [[() for _ in range(stages)] for _ in range(first + stages - 1 + count)]
    for s in range(stages):
        for i, op in enumerate(_forwards(s, stages, microbatches, chunks)):
            ticks[s + i][s] += (op,)
        for i, op in enumerate(_backwards(s, stages, microbatches, chunks)):
            ticks[first + stages - 1 - s + i][s] += (op,)
    return Table(name, stages, chunks, microbatches, tuple(tuple(tick) for tick in ticks))


def forward_only(stages: int, microbatches: int, chunks: int = 1) -> Table:
    """For evaluation: all forwards, as early as they can be."""
    orders = tuple(_forwards(s, stages, microbatches, chunks) for s in range(stages))
    return Table("forward", stages, chunks, microbatches, pack(orders))


def pack(orders: Sequence[Order]) -> tuple[Tick, ...]:
    """Ticks in which each stage does the next op of its order as soon as what it needs was done in an earlier tick.

    Raises ScheduleError for orders that wait for one another.
    """
    stages, at = len(orders), [0] * len(orders)
    depth = 1 + max(op.chunk for order in orders for op in order)
    done: set[Op] = set()
    ticks: list[Tick] = []
    while any(at[s] < len(orders[s]) for s in range(stages)):
        tick: list[tuple[Op, ...]] = []
        for s in range(stages):
            following = orders[s][at[s] : at[s] + 1]
            tick.append(following if following and done.issuperset(needs(following[0], depth)) else ())
        if not any(tick):
            stuck = [str(orders[s][at[s]]) for s in range(stages) if at[s] < len(orders[s])]
            raise ScheduleError(f"the stages wait for one another: {', '.join(stuck)}")
        for s, work in enumerate(tick):
            at[s] += len(work)
            done.update(work)
        ticks.append(tuple(tick))
    return tuple(ticks)


def needs(op: Op, depth: int) -> tuple[Op, ...]:
    """What must be done before: of a forward the chunk before, of a backward its forward and the chunk behind."""
    match op.kind:
        case Kind.FORWARD:
            return (Op(Kind.FORWARD, op.chunk - 1, op.microbatch),) if op.chunk else ()
        case Kind.BACKWARD | Kind.BACKWARD_INPUT:
            own = Op(Kind.FORWARD, op.chunk, op.microbatch)
            return (own,) if op.chunk == depth - 1 else (own, Op(op.kind, op.chunk + 1, op.microbatch))
        case Kind.BACKWARD_WEIGHT:
            return (Op(Kind.BACKWARD_INPUT, op.chunk, op.microbatch),)


def _forwards(stage: int, stages: int, microbatches: int, chunks: int) -> Order:
    """Chunk by chunk for each group of S microbatches."""
    return tuple(
        Op(Kind.FORWARD, c * stages + stage, m)
        for begin in range(0, microbatches, stages)
        for c in range(chunks)
        for m in range(begin, min(begin + stages, microbatches))
    )


def _backwards(stage: int, stages: int, microbatches: int, chunks: int) -> Order:
    """The same, the last chunk first."""
    return tuple(
        Op(Kind.BACKWARD, c * stages + stage, m)
        for begin in range(0, microbatches, stages)
        for c in reversed(range(chunks))
        for m in range(begin, min(begin + stages, microbatches))
    )


def _one_by_one(stage: int, stages: int, microbatches: int, chunks: int) -> Order:
    """Some forwards ahead, then a forward and a backward in turn, then the backwards that are left."""
    forwards = _forwards(stage, stages, microbatches, chunks)
    backwards = _backwards(stage, stages, microbatches, chunks)
    hops = stages - 1 - stage
    ahead = hops if chunks == 1 else min(2 * hops + (chunks - 1) * stages, len(forwards))
    turns = [op for pair in zip(forwards[ahead:], backwards, strict=False) for op in pair]
    return (*forwards[:ahead], *turns, *backwards[len(forwards) - ahead :])


def _zero_bubble(stages: int, microbatches: int) -> tuple[Order, ...]:
    """ZB-H1: the weights' halves fill what would be bubble, and no stage keeps more than S activations.

    Built tick by tick with ops of one unit: a forward where one is allowed, else an input's half, else a weights' half.
    That takes 3 M + S - 1 ticks.
    """
    orders: list[list[Op]] = [[] for _ in range(stages)]
    counts = [dict.fromkeys(Kind, 0) for _ in range(stages)]
    done: set[Op] = set()
    while any(counts[s][Kind.BACKWARD_WEIGHT] < microbatches for s in range(stages)):
        chosen: list[tuple[int, Op]] = []
        for s in range(stages):
            op = _next_of_zero_bubble(s, stages, microbatches, counts[s], done)
            if op is not None:
                chosen.append((s, op))
        for s, op in chosen:
            orders[s].append(op)
            counts[s][op.kind] += 1
            done.add(op)
    return tuple(tuple(order) for order in orders)


def _next_of_zero_bubble(
    stage: int, stages: int, microbatches: int, counts: dict[Kind, int], done: set[Op]
) -> Op | None:
    forwards, inputs, weights = (counts[k] for k in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT))
    candidates = []
    # Ahead of its inputs' halves no more than 1f1b is, and with those that wait for their weights' half no more than S.
    if forwards < microbatches and forwards - inputs < stages - stage and forwards - weights < stages:
        candidates.append(Op(Kind.FORWARD, stage, forwards))
    if inputs < microbatches:
        candidates.append(Op(Kind.BACKWARD_INPUT, stage, inputs))
    if weights < inputs:
        candidates.append(Op(Kind.BACKWARD_WEIGHT, stage, weights))
    return next((op for op in candidates if done.issuperset(needs(op, stages))), None)
