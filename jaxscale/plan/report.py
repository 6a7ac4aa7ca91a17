"""What a plan says: memory on each device, the pipeline's schedules, and what a compiled step sends over the links.

Data in, data out; `text_of` is for people. Read next: `../commands/plan.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxscale.config import PipelineConfig
from jaxscale.parallel.costs import Choice, OpCosts, compare
from jaxscale.plan.traffic import Transfer
from jaxscale.train.summary import human_bytes, human_count


@dataclass(frozen=True)
class Link:
    """All collectives of one kind over the same axes, inside loops or outside."""

    kind: str
    axes: tuple[str, ...]
    in_loop: bool
    count: int
    """Executions in a step."""
    nbytes: float
    """In a step, on one device."""
    asynchronous: float
    """Share of the bytes that other work can run beside."""
    hidden: float
    """Share that has a matrix product or a kernel to hide behind."""


@dataclass(frozen=True)
class Plan:
    """Facts of one config on one mesh. Bytes are per device."""

    name: str
    mesh: str
    parameters: int
    held: Mapping[str, int]
    """Bytes of the state by kind, before any compilation."""
    capacity: float
    """Bytes of memory of a device; 0 where the chip is not known."""
    on_host: int = 0
    """Bytes of the state in the host's memory, for each device."""
    schedules: tuple[Choice, ...] = ()
    """Of the pipeline, the cheapest first; empty without stages."""
    schedule: str = ""
    """The one that the config has, with its chunks."""
    padding: str = ""
    """What stages of unequal numbers of layers keep for nothing; empty where there is none."""
    compiled: Mapping[str, Any] | None = None
    """What `CompiledStep` has, `total` bytes of a device, and `flops` of a step's products."""
    links: tuple[Link, ...] = ()
    hidden_in_loops: float | None = None
    """Share of the bytes of collectives in loops that is asynchronous with work to hide behind."""
    warnings: tuple[str, ...] = ()

    @property
    def lacking(self) -> float:
        """Bytes that a device would need more than it has; 0 or less: it fits."""
        needed = self.compiled["total"] if self.compiled is not None else sum(self.held.values())
        return needed - self.capacity if self.capacity else 0.0


def links_of(found: Sequence[Transfer]) -> tuple[Link, ...]:
    """Sums by kind, axes and whether it is in a loop; what moves most first."""
    groups: dict[tuple[str, tuple[str, ...], bool], list[Transfer]] = {}
    for one in found:
        groups.setdefault((one.kind, one.axes, one.in_loop), []).append(one)
    links = []
    for (kind, axes, in_loop), members in groups.items():
        total = _bytes(members)
        links.append(
            Link(
                kind=kind,
                axes=axes,
                in_loop=in_loop,
                count=sum(one.times for one in members),
                nbytes=total,
                asynchronous=_bytes(one for one in members if one.asynchronous) / total if total else 0.0,
                hidden=_bytes(one for one in members if one.hides) / total if total else 0.0,
            )
        )
    return tuple(sorted(links, key=lambda link: -link.nbytes))


def hidden_share(found: Sequence[Transfer]) -> float | None:
    """Of the bytes of collectives in loops, the share that can hide behind other work; None where nothing moves."""
    inside = [one for one in found if one.in_loop]
    total = _bytes(inside)
    return _bytes(one for one in inside if one.hides) / total if total else None


def schedules_of(
    layers: int, stages: int, microbatches: int, pipeline: PipelineConfig, head: float
) -> tuple[Choice, ...]:
    """Schedules that these sizes allow, the cheapest in lockstep first, for the division that the config has and the
    even ones; a backward half takes as long as a forward, which the runtime computes again. head: in layers.
    """
    shares = {}
    for v in range(1, layers // stages + 1):
        given = pipeline.layers if v == pipeline.chunks else ()
        if given or layers % (stages * v) == 0:
            sizes = given or (layers // (stages * v),) * (stages * v)
            work = (*sizes[:-1], sizes[-1] + head)
            shares[v] = tuple(one * len(sizes) / layers for one in work)
    return tuple(compare(stages, microbatches, list(shares), OpCosts(1.0, 1.0, 1.0, 1.0), shares))


def text_of(plan: Plan) -> str:
    """The whole plan for a terminal."""
    lines = [plan.name, f"  model   {human_count(plan.parameters)} parameters", f"  mesh    {plan.mesh}"]
    held = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.held.items())
    on_host = f"; in the host's memory {human_bytes(plan.on_host)}" if plan.on_host else ""
    lines.append(f"  state   per device: {held}{on_host}")
    lines += [f"  {line}" for line in (plan.padding, *plan.warnings) if line]
    if plan.schedules:
        lines.append("  pipeline schedules, costs in forwards of a microbatch through an even share of the layers:")
        lines.append("    schedule      chunks  in lockstep  if nobody waited  bubble")
        for one in plan.schedules:
            mark = "  <- this config" if f"{one.name} {one.chunks}" == plan.schedule else ""
            figures = f"{one.lockstep:<11.1f}  {one.asynchronous:<16.1f}  {one.bubble:.1%}"
            lines.append(f"    {one.name:<12}  {one.chunks:<6}  {figures}{mark}")
    if plan.compiled is not None:
        kinds = ("arguments", "temporaries", "outputs", "peak", "code", "host")
        sizes = ", ".join(f"{kind} {human_bytes(plan.compiled[kind])}" for kind in kinds if plan.compiled[kind])
        how = "found compiled" if plan.compiled["cached"] else f"compiled in {plan.compiled['seconds']:.0f} s"
        lines.append(f"  program {how}: {sizes}; {human_bytes(plan.compiled['total'])} in all")
        lines.append("  collective           axes              where    a step  bytes       asynchronous  hidden")
        for link in plan.links:
            where = "loops" if link.in_loop else "once"
            shares = f"{link.asynchronous:<12.0%}  {link.hidden:.0%}"
            size = human_bytes(link.nbytes)
            lines.append(
                f"  {link.kind:<19}  {' x '.join(link.axes):<16}  {where:<7}  {link.count:<6}  {size:<10}  {shares}"
            )
        if plan.hidden_in_loops is not None:
            share = f"{plan.hidden_in_loops:.1%}"
            lines.append(f"  of the bytes in loops {share} are asynchronous with a product or a kernel to hide behind")
    if plan.capacity:
        room = human_bytes(plan.capacity)
        known = "" if plan.compiled is not None else " (state and gradients alone; --compile counts activations too)"
        if plan.lacking > 0:
            lines.append(f"  does not fit: {human_bytes(plan.lacking)} more than the {room} of a device{known}")
        else:
            lines.append(f"  fits: {human_bytes(-plan.lacking)} of the {room} of a device are left{known}")
    return "\n".join(lines)


def json_of(plan: Plan) -> dict[str, Any]:
    """The same as plain data, with the names that other programs read.

    `fits`; `hbm_bytes` of a device: params, optimizer, gradients, activations (what a compiled program uses beside the
    state; null without one), total, limit (null where the chip is not known); `collectives`; `compiled` (null without);
    and whatever else the plan says, under the plan's own names.
    """
    step, total = plan.compiled, sum(plan.held.values())
    rest = total - plan.held["gradients"]
    compiled = None
    if step is not None:
        total = step["total"]
        compiled = {
            "argument_bytes": step["arguments"],
            "temp_bytes": step["temporaries"],
            "output_bytes": step["outputs"] + step["aliased"],
            "alias_bytes": step["aliased"],
            "peak_bytes": step["peak"],
            "code_bytes": step["code"],
            "host_bytes": step["host"],
            "flops": step["flops"],
            "seconds_to_compile": step["seconds"],
            "cached": step["cached"],
        }
    return {
        "name": plan.name,
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "fits": plan.lacking <= 0,
        "lacking_bytes": plan.lacking,
        "hbm_bytes": {
            "params": plan.held["parameters"],
            "optimizer": rest - plan.held["parameters"],
            "gradients": plan.held["gradients"],
            "activations": None if step is None else max(0, total - sum(plan.held.values())),
            "total": total,
            "limit": plan.capacity or None,
        },
        "host_bytes": plan.on_host,
        "collectives": [
            {
                "kind": link.kind,
                "axis": " x ".join(link.axes),
                "bytes": link.nbytes,
                "count": link.count,
                "asynchronous": link.asynchronous,
                "hidden": link.hidden,
                "in_loop": link.in_loop,
            }
            for link in plan.links
        ],
        "hidden_in_loops": plan.hidden_in_loops,
        "compiled": compiled,
        "schedules": [dataclasses.asdict(one) for one in plan.schedules],
        "schedule": plan.schedule,
        "padding": plan.padding,
        "warnings": list(plan.warnings),
    }


def _bytes(found: Any) -> float:
    return sum(one.nbytes * one.times for one in found)
