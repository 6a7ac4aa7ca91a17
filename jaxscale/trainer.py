"""Training without a supervisor: forms the world, opens the run directory, runs one worker, and says how it ended.

Read next: `worker.py`, then `train/loop.py`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxscale.checkpoint.due import Apart
from jaxscale.checkpoint.durable import DurableCheckpoints, warm_up
from jaxscale.checkpoint.tier import DurableTier
from jaxscale.config import Config
from jaxscale.mesh import mesh_sizes_for, prepare_backend
from jaxscale.recipe import Hooks
from jaxscale.run_directory import TAIL_BYTES, RunDirectory, open_run
from jaxscale.track.jsonl import JsonlMetrics, backwards
from jaxscale.track.sinks import check_trackers, make_sinks
from jaxscale.train.display import Display, last_line
from jaxscale.train.flops import peak_flops
from jaxscale.train.logs import log_failure, native_output_to
from jaxscale.train.loop import UNFINISHED
from jaxscale.train.programs import CompileHere
from jaxscale.train.protocols import ExitReason, MetricsSink, Outcome, Section, Sinks, Start, World
from jaxscale.train.stop import AgreedStop, StopFlag, signals
from jaxscale.worker import run_worker
from jaxscale.world import Agreement, WorldError, barrier, membership
from jaxscale.world_check import check_alike

ABORT_SECONDS = 5.0
"""How long a failing process waits for a save under way, which in a world may wait for a process that is gone."""

REFUSED_SECONDS = 5.0
"""How long a process that refuses its input waits for the others to do so too."""

logger = logging.getLogger(__name__)


def train(config: Config, world: World | None, hooks: Hooks | None = None) -> ExitReason:
    """Trains in this process. `world`: what `--distributed` says; None = JAX finds it.

    The run's own directory decides whether this starts, goes on, or has nothing to do. Raises ConfigError, DataError
    and their like on bad input, before anything is written; SaveFailed when the last state could not be saved.
    """
    mesh_sizes_for(config)  # refused, where it can be, before this process waits for others
    source = config.model.source(config)  # built before the world forms: nobody waits for token files in a collective
    with signals() as stop, contextlib.ExitStack() as stack:
        prepare_backend(config, world)
        warm_up()
        with stop.ends_at_once("the processes of the world met"):
            joined = stack.enter_context(membership(world))
            check_alike(joined, config, source.identity())
        directory = open_run(config, joined)
        stack.callback(_close, directory, joined)
        if joined.processes > 1:
            stack.enter_context(native_output_to(directory.native_log))
        return _train_in(config, replace(joined, epoch=directory.epoch), directory, stop, hooks)


def _close(directory: RunDirectory, world: World) -> None:
    """What is refused, all processes refuse: each tidies up before the first of them leaves and so ends the others."""
    unused = directory.is_unused
    if not world.is_writer:
        directory.close()
    if unused:
        with contextlib.suppress(WorldError):  # another one trains, or is gone: this failure is not one of the input
            barrier(world, "refused", REFUSED_SECONDS)
    if world.is_writer:
        directory.close()


def _train_in(config: Config, world: World, directory: RunDirectory, stop: StopFlag, hooks: Hooks | None) -> ExitReason:
    plain = _PlainRun(config, world, directory)
    plain.tier.on_lost = lambda: _ask(stop)
    agreement = Agreement(world)
    try:
        outcome = run_worker(
            config,
            world,
            lambda abstract: plain.restore(abstract),
            Sinks(
                begin=plain.begin,
                snapshot=plain,
                metrics=plain,
                progress=plain,
                stop=AgreedStop(stop, agreement),
                message=plain.message,
                event=directory.event,
                directory=directory.path,
                programs=CompileHere(),
            ),
            hooks,
        )
    except BaseException as error:
        log_failure(error)
        plain.abort()
        if world.processes > 1 and "Gloo" in str(error):  # JAX raises it under several types
            raise WorldError(
                f"process {world.index} of {world.processes} lost another one in the middle of a step, whose own "
                f"output says why it ended; start all of them again to go on from the newest checkpoint ({error})"
            ) from error
        raise
    finally:
        agreement.close()
        if plain.apart is not None:
            plain.apart.close()
    plain.finish(outcome)
    return outcome.reason


def _ask(stop: StopFlag) -> None:
    """Another job has this run: training ends, and its last save says why."""
    stop.reason = stop.reason or "the loss of the run"


class _PlainRun:
    """Snapshot, metrics and progress of a run without a supervisor: Orbax, metrics.jsonl and trackers, a terminal."""

    def __init__(self, config: Config, world: World, directory: RunDirectory) -> None:
        self._config, self._world, self._directory = config, world, directory
        self._checkpoints: DurableCheckpoints | None = None
        job = secrets.token_hex(8)
        self.tier = DurableTier(directory.path, config, world, job, directory.event)
        checkpoint = config.checkpoint
        self.apart = Apart(world, checkpoint.apart, self.tier.event) if checkpoint.every == "auto" else None
        self._sinks: list[MetricsSink] = []
        self._display: Display | None = None
        self._restored: int | None = None
        self._sources: dict[str, int] = {}
        """Arrays of the restored state, by tier."""
        self._restore_seconds = 0.0
        self._nothing_to_do = False
        """Whether the restored state has all the steps that are asked for: then no file of the run changes."""

    def restore(self, abstract: Mapping[str, Any]) -> Any:
        """The newest checkpoint of the run that can be trusted, wherever it lies, or None."""
        started = time.monotonic()
        found = self.tier.restore(abstract)
        if found is not None:
            state, record = found
            self._restored, self._sources = record.step, {"durable": len(jax.tree.leaves(state))}
            self._restore_seconds = time.monotonic() - started
        return found

    def begin(self, start: Start) -> None:
        config, directory = self._config, self._directory
        journal: JsonlMetrics | None = None
        summary = start.summary
        is_finished = self._restored is not None and self._restored >= config.steps
        if is_finished and not start.metrics_line.get(UNFINISHED):
            self._find_nothing_to_do(start)
            return
        if self._world.is_writer:
            check_trackers(config)
            if lost := self._lost_steps():
                summary = replace(summary, notes=(lost, *summary.notes))
        directory.begin(start.environment)  # before the writers: a start that is cut short leaves a run directory
        self.tier.begin()
        if self._world.is_writer:
            if self._restored is not None:
                seconds = round(self._restore_seconds, 4)
                directory.event("restored", step=self._restored, sources=self._sources, seconds=seconds)
            self._sinks = make_sinks(config, directory.path)
            journal = next(sink for sink in self._sinks if isinstance(sink, JsonlMetrics))
            if start.tokenizer is not None:
                start.tokenizer.save(directory.tokenizer)
            journal.ensure_line(start.metrics_line)
        for note in summary.notes:
            logger.info("%s", note)
        self._checkpoints = self._open_checkpoints(journal)
        self._display = Display(
            config.steps,
            enabled=self._world.is_writer,
            unit=config.model.unit,
            flops_per_token=start.flops_per_token,
            peak=peak_flops(start.devices, config.precision.compute) if self._world.is_writer else None,
        )
        self._display.start(summary)

    def _find_nothing_to_do(self, start: Start) -> None:
        """In place of `begin` on a finished run. Only the last line, if a kill lost it, is written again."""
        self._nothing_to_do = True
        if self._world.is_writer:
            journal = JsonlMetrics(self._directory.metrics)
            journal.ensure_line(start.metrics_line)
            journal.close()
        if self._config.checkpoint.locations:
            self.tier.begin()  # what an earlier start could not copy is copied now
        self._checkpoints = self._open_checkpoints(None)
        self._display = Display(self._config.steps, enabled=self._world.is_writer)

    def _open_checkpoints(self, journal: JsonlMetrics | None) -> DurableCheckpoints:
        return DurableCheckpoints(
            self._directory.checkpoints,
            self._config.checkpoint.every,
            self._config.checkpoint.keep,
            apart=self.apart,
            milestones=self._config.checkpoint.milestones,
            restored=self._restored,
            refused=self.tier.refused,
            event=self.tier.event,
            before_seal=lambda: self._before_seal(journal),
            before_save=self.tier.check,
        )

    def _before_seal(self, journal: JsonlMetrics | None) -> None:
        if journal is not None:
            journal.commit()
        self.tier.check_patiently()

    def _lost_steps(self) -> str:
        """A line for people where steps were trained here before and no checkpoint of them is left; else empty."""
        if self._restored is not None:
            return ""
        lines = backwards(self._directory.metrics, limit=TAIL_BYTES)
        done = next((line["step"] for line in lines if isinstance(line.get("step"), int)), 0)
        if not done:
            return ""
        return (
            f"metrics.jsonl goes to step {done:,}, but no checkpoint of the run is there: training starts over from "
            f"step 0, in epoch {self._directory.epoch}"
        )

    # Snapshot
    def wants(self, step: int) -> bool:
        return self._opened().wants(step)

    def offer(self, step: int, state: Mapping[str, Any], record: Any, *, final: bool = False) -> None:
        self._opened().offer(step, state, record, final=final)

    # MetricsSink
    def write(self, line: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(line)
        if self._display is not None:
            self._display.write(line)

    def close(self, save_seconds: float | None = None) -> None:
        """Ends what `begin` opened. Raises SaveFailed if the newest state is not safe, after `save_seconds` at most.

        Without such a limit it waits for the copies at other locations too, and raises CopyFailed.
        """
        try:
            if self._checkpoints is not None:
                self._checkpoints.close(save_seconds)
                if save_seconds is None:
                    self.tier.wait()
        finally:
            self.tier.close(unused=self._directory.is_unused)
            for sink in self._sinks:
                sink.close()

    # Progress
    def enter(self, section: Section, step: int) -> None:
        if self._display is not None:
            self._display.enter(section, step)

    def message(self, text: str) -> None:
        if self._display is not None:
            self._display.message(text)

    def finish(self, outcome: Outcome) -> None:
        self.close()
        if outcome.reason is ExitReason.COMPLETED and self._world.is_writer and not self._is_told(outcome.step):
            self._directory.event("done", step=outcome.step)
        if self._display is not None:
            self._display.finish(self._last_line(outcome))

    def _is_told(self, step: int) -> bool:
        """Whether `done` is not to be written: of a run with more steps than are asked for, or once more."""
        if not self._nothing_to_do:
            return False
        events = backwards(self._directory.events, limit=TAIL_BYTES)
        return step > self._config.steps or any(e.get("kind") == "done" and e.get("step") == step for e in events)

    def _last_line(self, outcome: Outcome) -> str:
        reason, step, asked = outcome
        wanted, place = self._config.steps, _short(self._directory.path)
        if reason is ExitReason.COMPLETED and self._nothing_to_do:
            has = (
                f"{place} has all {step:,} steps" if step == wanted else f"{place} has {step:,} steps, not {wanted:,},"
            )
            return f"nothing to do: {has} already; a higher --steps goes on from there"
        return last_line(reason, step, wanted, place, asked)

    def abort(self) -> None:
        """After a failure: leaves the terminal and the files in order; the failure itself is what gets reported."""
        if self._display is not None:
            self._display.close()
        with contextlib.suppress(Exception):  # whatever is wrong with the last save, the first error is the one to tell
            self.close(ABORT_SECONDS)

    def _opened(self) -> DurableCheckpoints:
        assert self._checkpoints is not None, "begin comes before the first snapshot"
        return self._checkpoints


def _short(path: Path) -> str:
    """Relative to the current folder where that is shorter to read."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
