"""The one screen that a run prints before its first step: what is trained, on what, with how much memory, where.

Read next: `display.py`, which prints it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxscale.host_memory import is_on_host

KINDS = {
    "params": "parameters",
    "opt": "optimizer",
    "ema": "moving average",
    "tables": "tables",
    "across": "unsent gradients",
    "local": "slice's own",
}
"""State entries whose memory a person wants to know, and what they are called."""


@dataclass(frozen=True)
class Summary:
    """The facts of a start. Bytes are per device; `data_tokens` is 0 where the data does not say."""

    name: str
    parameters: int
    mesh: str
    """`mesh.describe`."""
    bytes_per_device: Mapping[str, int]
    steps: int
    rows: int
    sequence: int
    run_dir: str
    unit: str = "tokens"
    """Or examples, which are rows of one (`sequence` 1)."""
    microbatches: int = 1
    precision: str = ""
    data: str = ""
    data_tokens: int = 0
    resumed_from: int = 0
    """Steps done before this start."""
    host_bytes: int = 0
    """Of the state in the hosts' memory, for each device."""
    notes: tuple[str, ...] = field(default=())
    """Whole lines: what a resume changed, how the schedule goes on, warnings."""

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.sequence


def bytes_per_device(
    state: Mapping[str, Any], reduce_dtype_bytes: int = 4, gradients: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Bytes that a state takes in each device's memory, by kind; leaves are arrays or ShapeDtypeStructs with shardings.

    Gradients are as the parameters, or have the shapes and shardings of `gradients`, in the dtype they are reduced in;
    they live only during a step.
    """
    held = {name: sum(map(_shard_bytes, jax.tree.leaves(state[key]))) for key, name in KINDS.items() if key in state}
    summed = state["params"] if gradients is None else gradients
    return {**held, "gradients": sum(_shard_size(leaf) * reduce_dtype_bytes for leaf in jax.tree.leaves(summed))}


def summary_lines(summary: Summary) -> list[str]:
    """The screen, at most 20 lines of text."""
    memory = ", ".join(f"{name} {human_bytes(size)}" for name, size in summary.bytes_per_device.items())
    split = f" in {summary.microbatches} microbatches" if summary.microbatches > 1 else ""
    on_host = f"; on its host {human_bytes(summary.host_bytes)}" if summary.host_bytes else ""
    rows = [
        ("model", f"{human_count(summary.parameters)} parameters{summary.precision and ', ' + summary.precision}"),
        ("mesh", summary.mesh),
        ("memory", f"per device: {memory} (activations come on top){on_host}"),
        ("step", _step(summary) + split),
        ("data", _data(summary)),
        ("run", summary.run_dir),
        (
            "steps",
            f"{summary.steps:,}" + (f", resumed after step {summary.resumed_from:,}" if summary.resumed_from else ""),
        ),
    ]
    notes = list(summary.notes)
    room = 20 - 1 - len(rows)
    if len(notes) > room:
        notes = [*notes[: room - 1], f"... and {len(notes) - room + 1} more lines, see the run's log"]
    return [summary.name, *(f"  {name:<7} {text}" for name, text in rows if text), *(f"  {note}" for note in notes)]


def human_bytes(size: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def human_count(count: float) -> str:
    """8030261248 -> `8.03 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f}"


def _step(summary: Summary) -> str:
    if summary.unit != "tokens":
        return f"{summary.rows:,} {summary.unit}"
    return f"{summary.rows} rows x {summary.sequence} = {summary.tokens_per_step:,} tokens"


def _data(summary: Summary) -> str:
    if not summary.data_tokens:
        return summary.data
    passes = summary.steps * summary.tokens_per_step / summary.data_tokens
    size = f"{human_count(summary.data_tokens)} {summary.unit}"
    return f"{summary.data}: {size}, {passes:.2g} passes in {summary.steps:,} steps"


def _shard_size(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) if leaf.sharding is not None else math.prod(leaf.shape)


def _shard_bytes(leaf: Any) -> int:
    return 0 if is_on_host(leaf) else _shard_size(leaf) * leaf.dtype.itemsize
