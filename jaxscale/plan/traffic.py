"""What a compiled program sends over the links: each collective, its bytes and axes, how often, what it hides behind.

A collective is *asynchronous* where the schedule has other work between its begin and its end. In HLO that takes four
forms: pairs of `X-start` and `X-done`; chains of such permutes between which a product is done piece by piece (windowed
einsum); and, on TPUs, fusions that begin a collective, carry it along with a product, and end it, or calls of the
SparseCores, which have a thread of their own (`call-start`, `call-update` that hands over the operands, `call-done`).
Pure. Read next: `report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxscale.plan.device_groups import KINDS, axes_of, group_size
from jaxscale.plan.program_text import Instruction, Program, flops, size_of, trip_count

BEGIN, END = "AsyncCollectiveStart", "AsyncCollectiveDone"
"""Custom calls in fusions of a TPU program that begin and end a collective."""
KERNELS = ("tpu_custom_call", "__cudnn", "__cublas")
"""Custom calls that compute: what runs beside them is hidden, though nobody tells their FLOPs."""


@dataclass(frozen=True)
class Transfer:
    """One collective of the program's text."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes that it runs over."""
    nbytes: float
    """Of its larger side on one device: what a gather gives, what a reduce-scatter takes."""
    times: int
    """Executions in one run of the program, by the trip counts of its loops."""
    in_loop: bool
    asynchronous: bool
    hidden_flops: float
    """Of matrix products between its begin and its end, in one execution."""
    beside_kernel: bool
    """Whether a kernel that somebody else wrote runs between them."""
    operation: str
    """Name of the operation in the program that JAX traced."""

    @property
    def hides(self) -> bool:
        """Whether there is work that it can hide behind."""
        return self.asynchronous and (self.hidden_flops > 0 or self.beside_kernel)


@dataclass
class _Open:
    """A collective that has begun and not ended."""

    one: Instruction
    kind: str
    flops: float = 0.0
    kernel: bool = False


def transfers(program: Program, sizes: Mapping[str, int]) -> list[Transfer]:
    """All collectives between devices. sizes: the mesh axes in device order. A loop without a known trip count counts
    once; of a conditional's branches each counts, for on other devices another one runs.
    """
    return list(_walk(program, program.entry, 1, False, sizes))


def _walk(program: Program, name: str, times: int, in_loop: bool, sizes: Mapping[str, int]) -> Iterator[Transfer]:
    opened: dict[str, _Open] = {}
    body = program.computations[name]
    by_name = {one.name: one for one in body}
    for one in body:
        kind, phase = _kind_of(program, one, by_name)
        if phase == "begin":
            opened[one.name] = _Open(_inner(program, one, kind, by_name), kind)
        elif phase == "end":
            begun = _begin_of(one, by_name, opened)
            if begun is not None:
                found = opened.pop(begun)
                yield from _transfer(found.one, found.kind, times, in_loop, sizes, found)
        elif phase == "whole":
            yield from _transfer(one, kind, times, in_loop, sizes, None)
        work, kernel = (flops(program, one), _is_kernel(one)) if phase != "whole" else (0.0, False)
        for still in opened.values():
            still.flops += work
            still.kernel |= kernel
        if one.opcode == "while":
            count = trip_count(program, one)
            yield from _walk(program, one.attribute("body"), times * (count or 1), True, sizes)
        elif one.opcode in ("call", "conditional"):
            for called in one.called:
                yield from _walk(program, called, times, in_loop, sizes)


def _kind_of(program: Program, one: Instruction, by_name: Mapping[str, Instruction]) -> tuple[str, str]:
    """(kind of collective, `begin`, `end` or `whole`); empty strings for everything else, a step of one included."""
    if one.opcode in ("call-start", "call-update", "call-done"):
        kinds = [inner.opcode for inner in _inside(program, _call_of(one, by_name)) if inner.opcode in KINDS]
        if not kinds or (one.opcode == "call-start" and not one.operands):  # Operands come with an update.
            return "", ""
        return kinds[0], "end" if one.opcode == "call-done" else "begin"
    for kind in KINDS:
        if one.opcode == kind:
            return kind, "whole"
        if one.opcode in (f"{kind}-start", f"{kind}-done"):
            return kind, "begin" if one.opcode.endswith("start") else "end"
    if one.opcode != "fusion":
        return "", ""
    inside = _inside(program, one)
    kinds = [inner.opcode for inner in inside if inner.opcode in KINDS]
    targets = {inner.attribute("custom_call_target") for inner in inside if inner.opcode == "custom-call"}
    if not kinds:
        return "", ""
    if BEGIN in targets:
        return kinds[0], "begin"
    if END in targets:
        return kinds[0], "end"
    return "", ""


def _inside(program: Program, one: Instruction) -> list[Instruction]:
    return [inner for called in one.called for inner in program.computations.get(called, ())]


def _call_of(one: Instruction, by_name: Mapping[str, Instruction]) -> Instruction:
    """The `call-start` that says what is called."""
    while one.opcode != "call-start" and one.operands and one.operands[0] in by_name:
        one = by_name[one.operands[0]]
    return one


def _inner(program: Program, one: Instruction, kind: str, by_name: Mapping[str, Instruction]) -> Instruction:
    """The collective itself, where a fusion or a call begins it."""
    if one.opcode in KINDS or one.opcode == f"{kind}-start":
        return one
    caller = one if one.opcode == "fusion" else _call_of(one, by_name)
    return next(inner for inner in _inside(program, caller) if inner.opcode == kind)


def _begin_of(end: Instruction, by_name: Mapping[str, Instruction], opened: Mapping[str, _Open]) -> str | None:
    """Name of the begun collective that this instruction ends: its operands lead back to it."""
    seen, left = set(), list(end.operands)
    while left:
        name = left.pop()
        if name in opened:
            return name
        one = by_name.get(name)
        if one is not None and name not in seen and one.opcode in ("get-tuple-element", "fusion", "bitcast"):
            seen.add(name)
            left += one.operands
    return None


def _transfer(
    one: Instruction, kind: str, times: int, in_loop: bool, sizes: Mapping[str, int], found: _Open | None
) -> Iterator[Transfer]:
    axes = axes_of(kind, one.attributes, sizes)
    if axes is None:
        return  # over one device: nothing moves
    count = group_size(kind, one.attributes, math.prod(sizes.values()))
    yield Transfer(
        kind=kind,
        axes=axes,
        nbytes=_larger(one, kind, count),
        times=times,
        in_loop=in_loop,
        asynchronous=found is not None,
        hidden_flops=found.flops if found is not None else 0.0,
        beside_kernel=found is not None and found.kernel,
        operation=one.attribute("op_name"),
    )


def _larger(one: Instruction, kind: str, count: int) -> float:
    arrays: Sequence[tuple[str, tuple[int, ...]]] = one.result
    if one.opcode.endswith("-start"):
        # A start gives (operands, results, context): of a gather the result is larger, of a permute they are alike.
        sized = [array for array in arrays if array[1]]
        return max((size_of([array]) for array in sized), default=0.0)
    return size_of(arrays) * (count if kind == "reduce-scatter" else 1)


def _is_kernel(one: Instruction) -> bool:
    return one.opcode == "custom-call" and one.attribute("custom_call_target").startswith(KERNELS)
