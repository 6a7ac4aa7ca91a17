"""Reads the text of a compiled program (HLO): its computations, their instructions in the order of the schedule.

Pure. Only what the planner asks for is understood; everything else stays text. Read next: `traffic.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1,
    "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*$")
_LINE = re.compile(r"^  (?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$", re.DOTALL)
_OPCODE = re.compile(r"(?<=[\s)}\]])(?P<opcode>[a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")

Array = tuple[str, tuple[int, ...]]
"""Dtype and shape."""


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    """One array, or those of a tuple."""
    operands: tuple[str, ...]
    attributes: str
    """What stands behind the operands."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the operands, where the same computation says them; a tuple's is that of its first array."""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it executes."""
        branches = _BRANCHES.search(self.attributes)
        found = [name.strip().removeprefix("%") for name in branches[1].split(",")] if branches else []
        return (*_CALLED.findall(self.attributes), *found)

    def attribute(self, name: str) -> str:
        """Value of `name=`; empty where it has none."""
        found = re.search(rf"\b{name}=%?(\"[^\"]*\"|[\w.:>-]+|\{{[^}}]*\}})", self.attributes)
        return found[1].strip('"') if found else ""


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    entry: str
    computations: Mapping[str, Sequence[Instruction]]
    """Name -> its instructions, in the order in which they run where the program is scheduled."""


def read_program(text: str) -> Program:
    """Raises ValueError for a text without an entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, body, pending = "", None, ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None and " = " not in line.partition("(")[0]:
            body = computations.setdefault(head["name"], [])
            entry = head["name"] if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread="):
            _add(body, pending)
            body, pending = None, ""
        elif body is not None and re.match(r"  (ROOT )?%?[\w.-]+ = ", line):
            _add(body, pending)
            pending = line
        elif body is not None:
            pending += "\n" + line  # an attribute of several lines
    if not entry:
        raise ValueError("this text has no entry computation: it is no HLO program")
    return Program(entry, {name: _with_shapes(found) for name, found in computations.items()})


def size_of(arrays: Sequence[Array]) -> float:
    """Bytes."""
    return sum(BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in arrays)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a while loop runs, where its text says so: a counter that is compared with a constant."""
    known = re.search(r'"?known_trip_count"?:?\s*=?\{"?n"?[:=]"?(\d+)"?\}', loop.attributes)
    if known:
        return int(known[1])
    body = program.computations.get(loop.attribute("condition"), ())
    by_name = {one.name: one for one in body}
    for one in body:
        if one.opcode == "compare" and one.attribute("direction") in ("LT", "GT", "NE"):
            for operand in one.operands:
                found = by_name.get(operand)
                if found is not None and found.opcode == "constant":
                    return _constant(found)
        if one.opcode == "fusion":  # the comparison may be inside, and its bound outside
            for operand in one.operands:
                found = by_name.get(operand)
                if found is not None and found.opcode == "constant" and found.result == (("s32", ()),):
                    return _constant(found)
    return None


def flops(program: Program, one: Instruction) -> float:
    """Of matrix products, of one execution: of the instruction itself, and of what it calls outside of loops."""
    if one.opcode == "dot":
        return 2.0 * _elements(one.result[0]) * _contracted(one)
    if one.opcode == "convolution":
        return 2.0 * _elements(one.result[0]) * _kernel(one)
    if one.opcode in ("fusion", "call", "conditional"):
        bodies = [sum(flops(program, inner) for inner in program.computations.get(name, ())) for name in one.called]
        return max(bodies, default=0.0) if one.opcode == "conditional" else sum(bodies)
    return 0.0


def total_flops(program: Program) -> float:
    """Of the matrix products of one run of the program, loops by their trip counts. Kernels do not tell theirs."""

    def of(name: str) -> float:
        total = 0.0
        for one in program.computations.get(name, ()):
            if one.opcode == "while":
                total += (trip_count(program, one) or 1) * of(one.attribute("body"))
            elif one.opcode == "call":
                total += sum(of(called) for called in one.called)
            elif one.opcode == "conditional":
                total += max((of(called) for called in one.called), default=0.0)
            else:
                total += flops(program, one)
        return total

    return of(program.entry)


def _constant(one: Instruction) -> int | None:
    found = re.match(r"-?\d+", one.operands[0]) if one.operands else None
    return int(found[0]) if found else None


def _elements(array: Array) -> int:
    return math.prod(array[1])


def _contracted(dot: Instruction) -> float:
    left = dot.shapes[0]
    dims = [int(d) for d in dot.attribute("lhs_contracting_dims").strip("{}").split(",") if d]
    return math.prod(left[d] for d in dims if d < len(left))


def _kernel(convolution: Instruction) -> float:
    """Products for each element of the result: the kernel's elements but those along its output features."""
    kernel = convolution.shapes[1]
    labels = convolution.attribute("dim_labels").partition("_")[2].partition("-")[0]
    if len(labels) != len(kernel) or "o" not in labels:
        return 0.0
    # A TPU writes products over several dims as convolutions with a window as wide as what it is moved over. Padded so
    # far that each place meets the kernel once, they cost one product and not one for each place of the window.
    spatial = [n for label, n in zip(labels, kernel, strict=True) if label not in "io"]
    sizes = [
        int(n)
        for n in convolution.attribute("window").partition("size=")[2].partition(" ")[0].strip("}").split("x")
        if n
    ]
    is_product = "pad=" in convolution.attributes and sizes == spatial
    return kernel[labels.index("i")] * (1 if is_product else math.prod(spatial))


def _with_shapes(body: Sequence[Instruction]) -> list[Instruction]:
    """Names are unique in a computation, and not always in a program."""
    shapes = {one.name: one.result[0][1] if one.result else () for one in body}
    return [replace(one, shapes=tuple(shapes.get(name, ()) for name in one.operands)) for one in body]


def _add(body: list[Instruction] | None, text: str) -> None:
    line = _LINE.match(text) if text else None
    if body is None or line is None:
        return
    rest = line["rest"]
    opcode = _OPCODE.search(rest)
    if opcode is None:
        return
    operands, behind = _inside(rest, opcode.end())
    result = tuple((dtype, _dims(dims)) for dtype, dims in _ARRAY.findall(rest[: opcode.start()]))
    names = tuple(re.sub(r"/\*.*?\*/", "", o).strip().rpartition(" ")[2].removeprefix("%") for o in _parts(operands))
    body.append(Instruction(line["name"], opcode["opcode"], result, names, rest[behind:]))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d)


def _inside(text: str, begin: int) -> tuple[str, int]:
    """What stands between the bracket before `begin` and its partner, and where the rest begins."""
    depth = 1
    for at in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at], at + 1
    return text[begin:], len(text)


def _parts(text: str) -> list[str]:
    """Parts between commas that are in no bracket."""
    found, depth, part = [], 0, ""
    for letter in text:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append(part)
            part = ""
        else:
            part += letter
    return [p for p in (*found, part) if p.strip()]
