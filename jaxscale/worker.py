"""One worker: from a config and a world to trained weights. A plain run is a world of one; a supervisor starts many.

Prepares what the loop needs, in the order mesh -> task -> audit -> data -> state, and refuses what cannot work before
anything is written. Read next: `train/loop.py`, then `trainer.py`, which runs a worker without a supervisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax

from jaxscale import audit, host_memory
from jaxscale import config as config_library
from jaxscale.checkpoint.stored_layout import restoring, storing
from jaxscale.config import Config
from jaxscale.data.loader import Loader
from jaxscale.data.position import changed_order, phase_at_step, phases, row_at_step
from jaxscale.data.source import Held, Source
from jaxscale.environment import environment
from jaxscale.mesh import describe, make_mesh, mesh_sizes
from jaxscale.mesh_file import chip_of
from jaxscale.ops import quantised
from jaxscale.optim.build import Optimizer, make_optimizer
from jaxscale.optim.schedules import describe as describe_schedule
from jaxscale.parallel.gradient_exchange import check_slices
from jaxscale.recipe import EvaluationContext, Hooks
from jaxscale.task import Batch, Params, Task
from jaxscale.train import profile
from jaxscale.train.evaluate import evaluate_batches, make_evaluate
from jaxscale.train.hooks import abstract_batches, check_hooks, run_evaluations, with_step_metrics
from jaxscale.train.initial import initial_state
from jaxscale.train.loop import Evaluate, Loop
from jaxscale.train.protocols import Outcome, Record, Restore, Sinks, Start, World
from jaxscale.train.samples import Sampler
from jaxscale.train.state import State, abstract_state, state_bytes
from jaxscale.train.step import make_step
from jaxscale.train.stop import StopAsked
from jaxscale.train.summary import Summary
from jaxscale.train.tables import weights_of
from jaxscale.world import barrier

COMPILE_SECONDS = 3600
"""How much longer one process may compile than another: on CPUs only process 0 finds programs in the cache."""


def run_worker(config: Config, world: World, restore: Restore, sinks: Sinks, hooks: Hooks | None = None) -> Outcome:
    """Trains until done or asked to stop. The backend is prepared and the world has formed.

    restore: gives the state to go on from. Raises ConfigError and DataError before anything is written; what the loop
    raises later.
    """
    hooks = hooks or Hooks()
    if not world.is_writer:
        sinks = replace(sinks, event=lambda *_, **__: None)  # every process sees the same: one of them tells
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        config.model.check(config, mesh.devices.flat[0].platform)
        host_memory.check(config, mesh.local_devices)
        task = with_step_metrics(config.model.task(config), hooks)
        report = audit.audit(task.parameters, mesh_sizes(mesh), config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        corpora = config.model.source(config)
        corpora.check_task(task)
        held = corpora.held_out()
        _check_evaluation(config, held, hooks)
        here = environment()
        abstract = abstract_state(config, task, optimizer)
        check_hooks(task, hooks, abstract["params"], abstract_batches(config, mesh))

        sinks = storing(task.stored_layout, sinks)
        restored = restoring(task.stored_layout, restore)(abstract)
        check_slices(
            config,
            mesh_sizes(mesh)["data"],
            len(task.parameters),
            fresh=restored is None,
            tables=task.tables is not None,
        )
        state, record, notes = _state_and_record(config, task, optimizer, corpora, here, abstract, restored)
        record = replace(record, epoch=world.epoch)
        notes += filter(None, [profile.note(config.run.profile, record.step, config.steps)])
        notes += filter(None, [_of_products(config, mesh.devices.flat[0])])
        notes += report.warnings
        summary = _summary(config, task, mesh, report.parameters, abstract, corpora, record, sinks, notes)
        sinks.begin(
            Start(
                summary=summary,
                environment=here,
                tokenizer=corpora.tokenizer,
                flops_per_token=task.flops_per_token(summary.sequence),
                devices=list(mesh.devices.flat),
                metrics_line=record.metrics_line,
            )
        )
        with Loader(config, corpora, mesh, record.step) as loader:
            evaluates = _evaluation_due(config, held, hooks)
            loop = Loop(
                config=config,
                sinks=sinks,
                loader=loader,
                train_step=make_step(config, task, optimizer),
                evaluate=_evaluator(config, task, corpora, mesh, held, hooks, sinks, world),
                evaluates=evaluates,
                state=state,
                record=record,
                epoch=world.epoch,
                meet=lambda name: barrier(world, name, COMPILE_SECONDS),
            )
            reason, asked = loop.run()
    return Outcome(reason, loop.record.step, asked)


def _state_and_record(
    config: Config,
    task: Task,
    optimizer: Optimizer,
    corpora: Source,
    here: dict[str, Any],
    abstract: State,
    restored: tuple[State, Record] | None,
) -> tuple[State, Record, list[str]]:
    """Where training starts: a restored state, or a fresh one; and lines that say what is different from before."""
    now: dict[str, Any] = {"config": config_library.to_dict(config), "data": corpora.identity(), "environment": here}
    if restored is None:
        state, note = initial_state(config, task, optimizer, abstract)
        return state, Record(step=0, row=0, metrics_line={}, **now), [note] if note else []
    state, record = restored
    from jaxscale.checkpoint.restore import resume_report

    corpora.check_identity(record.data, record.step)
    notes = resume_report(record, config, here, corpora.identity())
    if moved := changed_order(record.config, now["config"], record.step):
        raise config_library.ConfigError(
            f"the checkpoint of step {record.step} was trained on rows in another order ({'; '.join(moved)}), so its "
            "position means nothing here; keep these as they were, add a phase, or start another run with --init-from"
        )
    expected = row_at_step(phases(config), record.step)
    if expected != record.row:
        raise config_library.ConfigError(
            f"the checkpoint of step {record.step} stands at row {record.row}, but this config's batches and phases "
            f"lead to row {expected}; keep data.batch and the phases before step {record.step} as they were"
        )
    before = record.config["steps"]
    if before != config.steps:
        known = {name: value for name, value in record.config["optim"].items() if hasattr(config.optim, name)}
        notes.append("schedule: " + describe_schedule(config.optim, config.steps, before, type(config.optim)(**known)))
    return state, replace(record, **now), notes


def _summary(
    config: Config,
    task: Task,
    mesh: jax.sharding.Mesh,
    parameters: int,
    abstract: State,
    corpora: Source,
    record: Record,
    sinks: Sinks,
    notes: list[str],
) -> Summary:
    phase = phase_at_step(phases(config), record.step)
    return Summary(
        name=config.name,
        parameters=parameters,
        mesh=describe(mesh),
        bytes_per_device=state_bytes(config, task, abstract),
        host_bytes=host_memory.bytes_on_host(abstract),
        steps=config.steps,
        rows=phase.batch,
        sequence=phase.sequence if config.model.unit == "tokens" else 1,
        unit=config.model.unit,
        run_dir=str(sinks.directory),
        microbatches=config.train.microbatches,
        precision=f"{config.precision.weights} weights, {config.precision.compute} compute",
        data=", ".join(source.path for source in phase.sources),
        data_tokens=corpora.length(phase),
        resumed_from=record.step,
        notes=tuple(notes),
    )


def _of_products(config: Config, device: jax.Device) -> str:
    """What a person has to know of `precision.matmul` on this device."""
    chip = chip_of(device)
    peaks = {dtype: figure.value for dtype, figure in chip.peak.items()} if chip is not None else {}
    return quantised.note(config.precision.matmul, device.platform, peaks)


def _check_evaluation(config: Config, held: Held, hooks: Hooks) -> None:
    """Raises ConfigError where evaluations are asked for and there is nothing to evaluate."""
    if config.evaluate.every and not held.tokens and not hooks.evaluations:
        there = f"the {held.documents} held-out documents are empty" if held.documents else "no documents are held out"
        raise config_library.ConfigError(
            f"evaluate.every is {config.evaluate.every}, but {there} and the recipe has no evaluations of its own; "
            "set data.held-out-documents to some that have text, or evaluate.every to 0"
        )


def _evaluation_due(config: Config, held: Held, hooks: Hooks) -> Callable[[int], bool]:
    """Whether to evaluate after so many updates: every `evaluate.every`, and at the end where there is something to."""
    something = held.tokens > 0 or bool(hooks.evaluations)
    every, sample = config.evaluate.every, config.sample.every

    def due(done: int) -> bool:
        evaluates = something and (done == config.steps or (every > 0 and done % every == 0))
        return evaluates or (sample > 0 and done % sample == 0)

    return due


def _evaluator(
    config: Config,
    task: Task,
    corpora: Source,
    mesh: jax.sharding.Mesh,
    held: Held,
    hooks: Hooks,
    sinks: Sinks,
    world: World,
) -> Evaluate:
    """Everything that happens at an evaluation: held-out loss, the user's evaluations, a sample."""
    jitted = make_evaluate(task)
    compiled: list[Any] = []
    sampler = Sampler(config, task, corpora.tokenizer, sinks, world)

    def one(params: Params, batch: Batch) -> dict[str, jax.Array]:
        if not compiled:
            shape = "x".join(map(str, batch["loss_weight"].shape))
            compiled.append(sinks.programs.get(f"evaluate {shape}", lambda: jitted.lower(params, batch)))  # type: ignore[attr-defined]  # jitted
            barrier(world, "evaluation compiled", COMPILE_SECONDS)
        return compiled[0](params, batch)

    def batches() -> Iterator[Batch]:
        return corpora.evaluation_batches(config, mesh)

    def watch(step: int) -> None:
        """Every process does the same between its looks, so a stop is noticed by all at the same one."""
        if sinks.stop.requested():
            raise StopAsked
        sinks.progress.enter("evaluate", step)

    def watched(step: int) -> Iterator[Batch]:
        for batch in batches():
            watch(step)
            yield batch

    def evaluate(state: State, done: int) -> dict[str, float] | None:
        try:
            return whole(state, done)
        except StopAsked:
            return None  # an evaluation of a part of the documents would pass for one of all of them

    def whole(state: State, done: int) -> dict[str, float]:
        params = weights_of(state)
        results: dict[str, float] = {}
        if _evaluation_due(replace(config, sample=config_library.SampleConfig()), held, hooks)(done):
            results = evaluate_batches(one, params, watched(done), corpora.summarise)
            context = EvaluationContext(done, params, task, config, lambda: watched(done))
            results |= run_evaluations(hooks, context, lambda: watch(done))
        sampler.after(done, params, lambda: watch(done))
        return results

    return evaluate
