"""What a forked worker does: joins its epoch, restores from the memory of all hosts, trains, and says how it ended.

It is a `run_worker` like any other; only what the loop talks to is different: progress goes into shared memory,
snapshots into memory slots, words to the agent through a datagram socket. It never restarts itself. Read next:
`agent.py`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from jaxscale.config import Config, ConfigError, MeshConfig
from jaxscale.recipe import Recipe
from jaxscale.supervisor.jobs import WorkerJob, read_job
from jaxscale.supervisor.mailbox import Mailbox
from jaxscale.supervisor.records import PROGRESS, STACKS, ProgressRecord
from jaxscale.train.protocols import ExitReason, Sinks, World
from jaxscale.world_watch import is_collective

if TYPE_CHECKING:
    from jaxscale.supervisor.world_stop import StopSignals

TEXT_BYTES = 16384
"""How much of an error's text and traceback is told."""

logger = logging.getLogger(__name__)


def main(path: Path, recipe: Recipe, config: Config) -> int:
    """Runs the job in `path`; returns the exit code. Called in a forked process that has no backend yet."""
    from jaxscale.supervisor.world_stop import StopSignals

    asked = StopSignals()  # first of all: a signal without a handler would end the process
    job = read_job(path)
    folder = Path(job.folder)
    mailbox = Mailbox(folder, job.epoch)
    progress = ProgressRecord(folder / PROGRESS)
    progress.begin(job.epoch, os.getpid())
    stacks = open(folder / STACKS, "ab")  # noqa: SIM115 - for faulthandler, as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    try:
        reason, step = _train(job, recipe, config, mailbox, progress, asked)
    except BaseException as error:
        _report(mailbox, progress, error)
        return 2 if isinstance(error, ConfigError) else 1
    progress.finish()
    mailbox.say("finished", {"reason": reason.name, "step": step})
    return reason.value


def config_of(job: WorkerJob, config: Config) -> Config:
    """The recipe's config on the mesh of this job's world."""
    return dataclasses.replace(config, mesh=MeshConfig(**job.mesh), devices=job.devices)


def _train(
    job: WorkerJob,
    recipe: Recipe,
    config: Config,
    mailbox: Mailbox,
    progress: ProgressRecord,
    asked: StopSignals,
) -> tuple[ExitReason, int]:
    from jaxscale import jax_private
    from jaxscale.mesh import prepare_backend
    from jaxscale.run_directory import RunDirectory
    from jaxscale.supervisor.supervised_run import SupervisedRun
    from jaxscale.supervisor.world_stop import DRAIN, HANDOVER, WorldStop
    from jaxscale.train.logs import native_output_to
    from jaxscale.worker import run_worker
    from jaxscale.world import Agreement, barrier

    config = config_of(job, config)
    world = World(processes=job.processes, index=job.rank, address=job.address, epoch=job.epoch, host=job.host)
    prepare_backend(config, world)
    jax_private.connect(job.address, job.processes, job.rank)
    jax_private.gloo_at(job.listen)
    directory = RunDirectory(Path(job.run), config, job.epoch, world, lock=None, is_new=False)
    with native_output_to(directory.native_log):
        stop = WorldStop(asked, Agreement(world, DRAIN), Agreement(world, HANDOVER))
        hooks = recipe.hooks(config)
        supervised = SupervisedRun(job, config, world, directory, mailbox, stop, hooks)
        sinks = Sinks(
            begin=supervised.begin,
            snapshot=supervised,
            metrics=supervised,
            progress=progress,
            stop=stop,
            message=lambda text: mailbox.say("message", {"text": text}),
            event=directory.event,
            directory=directory.path,
            programs=supervised.programs,
        )
        reason, step, _ = run_worker(config, world, supervised.restore, sinks, hooks)
        supervised.close()
        barrier(world, "end of the run")  # nobody leaves before everybody's state is safe
    return reason, step


def _report(mailbox: Mailbox, progress: ProgressRecord, error: BaseException) -> None:
    text, at = str(error), progress.read()
    mailbox.say(
        "error",
        {
            "error_class": type(error).__name__,
            "text": text[:TEXT_BYTES],
            "traceback": story(error)[-TEXT_BYTES:],
            "is_collective": is_collective(error),
            "section": at.section,
            "step": at.step,
        },
    )
    logger.error("the worker ended with an error", exc_info=error)


def story(error: BaseException) -> str:
    """The traceback with the exception last: JAX appends a note about the frames it filtered, which says nothing."""
    notes = getattr(error, "__notes__", [])
    kept = [note for note in notes if "JAX has removed its internal frames" not in note]
    if kept != notes:
        error.__notes__ = kept
    return "".join(traceback.format_exception(error))
