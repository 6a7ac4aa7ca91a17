"""The training loop: data, step, metrics one step late, evaluation, snapshot, stop. Knows no model and no file format.

Everything it talks to is a protocol of `train/protocols.py`. Read next: `worker.py`, which prepares what it needs, and
`checkpoint/durable.py`, the snapshot of a plain run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxscale.config import Config
from jaxscale.data.loader import Loader
from jaxscale.train.metrics import Clock, Pending, make_line
from jaxscale.train.profile import Profiler, steps_to_trace
from jaxscale.train.protocols import ExitReason, Record, Sinks
from jaxscale.train.state import State
from jaxscale.train.step import Step

MOST_SKIPPED = 50
"""Updates skipped in a row after which a run gives up: it trains nothing and would never notice."""

Evaluate = Callable[[State, int], dict[str, float] | None]
"""(state, updates done) -> metrics for that step's line; None when a stop was asked for meanwhile."""

UNFINISHED = "evaluation_unfinished"
"""In the line of a step whose evaluation a stop cut short; the run that goes on from there evaluates first."""


class Diverged(RuntimeError):
    """Too many updates in a row were skipped."""


@dataclass
class Loop:
    """One run of the loop. `state` and `record` are where it stands; both belong to the same step."""

    config: Config
    sinks: Sinks
    loader: Loader
    train_step: Step
    evaluate: Evaluate
    evaluates: Callable[[int], bool]
    """Whether an evaluation is due after this many updates."""
    state: State
    record: Record
    epoch: int
    meet: Callable[[str], None]
    """Returns when every process is here: some compile for long, and collectives do not wait that long."""
    _programs: dict[Any, Any] = field(default_factory=dict)
    _pending: Pending | None = None
    _skipped_in_a_row: int = 0

    def run(self) -> tuple[ExitReason, str]:
        """Trains to `config.steps` or until a stop is asked for, and offers the last state as final.

        Returns the reason, and who asked for a stop. Raises Diverged, and whatever data, devices and disk raise.
        """
        clock, sinks = Clock(), self.sinks
        traced = steps_to_trace(self.config.run.profile, self.record.step, self.config.steps)
        profiler = Profiler(traced, sinks.directory, lambda: jax.block_until_ready(self.state))
        with profiler:
            if self.record.metrics_line.get(UNFINISHED):
                self._write_evaluated({k: v for k, v in self.record.metrics_line.items() if k != UNFINISHED})
                clock.restart()
            while self.record.step < self.config.steps:
                if asked := sinks.stop.requested():
                    return self._finish(clock, ExitReason.STOPPED, asked)
                step = self.record.step
                profiler.before(step)
                sinks.progress.enter("data", step)
                number, row, rows, batch = next(self.loader)
                assert (number, row) == (step, self.record.row), "the loader and the record are at different rows"
                program = self._program(batch, step, clock)
                sinks.progress.enter("step", step)
                self.state, metrics = program(self.state, batch, np.int32(step))
                self._write_pending(clock)
                self._pending = Pending(step + 1, row, rows, metrics)
                self._advance(step=step + 1, row=row + rows)
                self._after_step(clock)
        self._settle(clock)
        if self.record.metrics_line.get(UNFINISHED):
            return self._finish(clock, ExitReason.STOPPED, sinks.stop.requested())
        return self._finish(clock, ExitReason.COMPLETED, "")

    def _after_step(self, clock: Clock) -> None:
        """Evaluation and snapshot, where they are due after the step just dispatched."""
        done = self.record.step
        wanted = self.sinks.snapshot.wants(done)
        if not (wanted or self.evaluates(done)):
            return
        self._settle(clock)
        if wanted:
            self.sinks.progress.enter("save", done)
            self.sinks.snapshot.offer(done, self.state, self.record)
        clock.restart()

    def _settle(self, clock: Clock) -> None:
        """Finishes the step under way with its evaluation, so that its line is complete and in the record."""
        if self._pending is None:
            return
        jax.block_until_ready(self._pending.metrics)
        line = self._line(self._pending, clock)
        self._pending = None
        self._write_evaluated(line)

    def _write_evaluated(self, line: dict[str, Any]) -> None:
        """Writes the line of the state's own step, with its evaluation where one is due."""
        done = self.record.step
        results: Mapping[str, Any] | None = {}
        if self.evaluates(done):
            self.sinks.progress.enter("evaluate", done)
            results = self.evaluate(self.state, done)
        if results is None:
            results = {UNFINISHED: True}
        self._write({**line, "epoch": self.epoch, **results})
        loss = results.get("eval_loss")
        if loss is not None and loss < self.record.best.get("eval_loss", float("inf")):
            self._advance(best={"eval_loss": loss, "step": done})

    def _finish(self, clock: Clock, reason: ExitReason, asked: str) -> tuple[ExitReason, str]:
        self._settle(clock)
        if reason is ExitReason.COMPLETED and self.record.metrics_line.get("skipped", 0) == self.record.step > 0:
            raise Diverged(
                f"all {self.record.step} updates of this run were skipped: loss or gradient were never finite, so "
                "nothing was trained; look at the data and at the settings of the optimizer"
            )
        self.sinks.progress.enter("finish", self.record.step)
        self.sinks.snapshot.offer(self.record.step, self.state, self.record, final=True)
        return reason, asked

    def _program(self, batch: Mapping[str, jax.Array], step: int, clock: Clock) -> Any:
        """The compiled step for batches of this shape; a phase may bring a new one."""
        shape = batch["loss_weight"].shape
        if shape not in self._programs:
            self._write_pending(clock)
            self.sinks.progress.enter("compile", step)
            self._programs[shape] = self.sinks.programs.get(
                f"train step {'x'.join(map(str, shape))}",
                lambda: self.train_step.lower(self.state, batch, np.int32(step)),  # type: ignore[attr-defined]  # jitted
            )
            self.meet("step compiled")
            clock.restart()
        return self._programs[shape]

    def _write_pending(self, clock: Clock) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._write(self._line(pending, clock))

    def _line(self, pending: Pending, clock: Clock) -> dict[str, Any]:
        return make_line(pending, self.epoch, clock, self.config.run.layer_stats_every, self.config.model.unit)

    def _write(self, line: dict[str, Any]) -> None:
        before = self.record.metrics_line.get("skipped", 0)
        self._advance(metrics_line=line)
        self.sinks.metrics.write(line)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if line["skipped"] > before else 0
        if self._skipped_in_a_row:
            detail = f"step {line['step']}: update skipped, loss {line['loss']}, gradient norm {line['grad_norm']}"
            self.sinks.event("alarm", what="update skipped", detail=detail)
            if self._skipped_in_a_row in (1, 10):
                self.sinks.message(detail)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise Diverged(
                f"{MOST_SKIPPED} updates in a row were skipped up to step {line['step']} (loss {line['loss']}, "
                f"gradient norm {line['grad_norm']}); go back to an earlier checkpoint, lower optim.learning-rate or "
                "look at the data"
            )

    def _advance(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
