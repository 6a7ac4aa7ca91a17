"""Where a run is in its data: one integer, the next global row, the same on every host.

A run has phases; each gives the sequence length, the batch and the mixture from some step on. Everything here is a pure
function of the config: which phase a step is in, which row it starts with, and how far each source has been read when
a phase begins. Nothing else is stored, so changing hosts or devices moves nothing. Read next: `loader.py`.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxscale.config import Config, SourceConfig
from jaxscale.data.mixture import Proportions


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one sequence length, batch and mixture."""

    start: int
    """First optimizer step (0 = the first of the run)."""
    row: int
    """Global row that step `start` begins with."""
    sequence: int
    batch: int
    sources: tuple[SourceConfig, ...]
    generation: int
    """How often the sequence length has changed so far. Each generation reads every source anew, shuffled anew."""
    consumed: tuple[int, ...]
    """Rows of this generation that each of `sources` gave before this phase."""

    @property
    def proportions(self) -> Proportions:
        """Which source each row of the phase comes from, and which of the source's rows it is."""
        return Proportions(tuple(source.weight for source in self.sources), self.consumed)


def phases(config: Config) -> tuple[Phase, ...]:
    """The run's phases, in order. A border that keeps the sequence length continues every source where it was."""
    data = config.data
    table = [Phase(0, 0, data.sequence, data.batch, data.sources, 0, (0,) * len(data.sources))]
    consumed: dict[str, int] = {}  # by path: a source that pauses for a phase goes on where it was
    for change in config.phases:
        last = table[-1]
        rows = (change.start - last.start) * last.batch
        totals = last.proportions.counts(rows)
        consumed.update({source.path: total for source, total in zip(last.sources, totals, strict=True)})
        sequence = change.sequence or last.sequence
        generation = last.generation
        if sequence != last.sequence:  # windows of another length are other windows: no count carries over
            consumed.clear()
            generation += 1
        sources = change.mixture or last.sources
        already = tuple(consumed.get(source.path, 0) for source in sources)
        batch = change.batch or last.batch
        table.append(Phase(change.start, last.row + rows, sequence, batch, sources, generation, already))
    return tuple(table)


def phase_at_step(table: tuple[Phase, ...], step: int) -> Phase:
    """The phase that step `step` (0 = the first) belongs to."""
    return table[bisect.bisect_right([phase.start for phase in table], step) - 1]


def row_at_step(table: tuple[Phase, ...], step: int) -> int:
    """First global row of step `step`; also the position after `step` steps."""
    phase = phase_at_step(table, step)
    return phase.row + (step - phase.start) * phase.batch


def changed_order(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> list[str]:
    """What decided the rows up to `step` and is another now: lines `field: old -> new`. Pure.

    old, new: `config.to_dict` of two runs. Paths do not count, a corpus is known by its content (which
    `Corpora.check_identity` compares, place by place); of a mixture the weights do. The microbatches count as well:
    row r is in part r mod their number. Phases that begin at `step` or later may be anything.
    """

    def order(tree: Mapping[str, Any]) -> dict[str, Any]:
        data = tree["data"]
        begun = [phase for phase in tree["phases"] if phase["start"] < step]
        return {
            "seed": tree["seed"],
            "train.microbatches": tree["train"]["microbatches"],
            **{f"data.{name}": data[name] for name in ("sequence", "batch", "shuffle")},
            "data.mixture weights": [source["weight"] for source in data["mixture"]],
            "phases": [
                [phase["start"], phase["sequence"], phase["batch"], [source["weight"] for source in phase["mixture"]]]
                for phase in begun
            ],
        }

    before, after = order(old), order(new)
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
