"""What one process of a world does in test_checkpoint_world.py: `... DISTRIBUTED ACTION FOLDER AXES`."""

import errno
import json
import os
import sys
from pathlib import Path

import jax
from states import make_abstract, make_mesh, make_record, make_state, same_bits

from jaxscale import config
from jaxscale.checkpoint.durable import DurableCheckpoints, SaveFailed
from jaxscale.checkpoint.layout import DamagedCheckpoint, list_steps
from jaxscale.checkpoint.restore import StateMismatch, restore_newest
from jaxscale.run_directory import RunDirectoryError, open_run
from jaxscale.track.jsonl import JsonlMetrics
from jaxscale.world import barrier, join, leave, parse_distributed


def save(folder, mesh):
    """Two saves in the background while the state is donated, one at the end that finds nothing more to do."""
    events = []
    checkpoints = DurableCheckpoints(
        folder, every=1, keep=2, event=lambda kind, **fields: events.append((kind, fields))
    )
    step_with_donation = jax.jit(
        lambda state: jax.tree.map(lambda x: (x * 3 + 1).astype(x.dtype), state), donate_argnums=0
    )
    for step in (1, 2, 3):
        state = make_state(mesh, seed=step)
        checkpoints.offer(step, state, make_record(step))
        step_with_donation(state)
        if step < 3:  # lets it end, so that the next one is not skipped
            checkpoints._save.wait()
            barrier(world, "saved")
    checkpoints.offer(3, make_state(mesh, seed=3), make_record(3), final=True)
    barrier(world, "all saved")
    assert list_steps(folder) == [2, 3]
    return [kind for kind, _ in events]


def fail(folder, mesh):
    """The disk of process 0 fails at step 1 and works again at step 2."""
    alarms = []
    checkpoints = DurableCheckpoints(folder, every=1, keep=2, event=lambda kind, **_: alarms.append(kind))
    if world.index == 0:
        folder.write_text("not a folder")
    checkpoints.offer(1, make_state(mesh, seed=1), make_record(1))
    barrier(world, "offered")
    if world.index == 0:
        folder.unlink()
    checkpoints.offer(2, make_state(mesh, seed=2), make_record(2), final=True)
    barrier(world, "all saved")
    assert list_steps(folder) == [2]
    return alarms


def fail_late(folder, mesh):
    """Process 0 fails in the middle of Orbax, where process 1 waits for it: at step 1, and at the end."""
    from orbax.checkpoint._src.path import atomicity

    commit = atomicity.on_commit_callback

    async def broken(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if world.index == 0:
        atomicity.on_commit_callback = broken
    checkpoints = DurableCheckpoints(folder, every=1, keep=2)
    checkpoints.offer(1, make_state(mesh, seed=1), make_record(1))
    if world.index == 0:
        checkpoints._save.wait()
        atomicity.on_commit_callback = commit
    barrier(world, "step 1 failed")
    checkpoints.offer(2, make_state(mesh, seed=2), make_record(2))
    barrier(world, "step 2 offered")
    checkpoints._save.wait()
    assert checkpoints._save.error is None
    barrier(world, "step 2 saved")
    if world.index == 0:
        assert list_steps(folder) == [2]
        atomicity.on_commit_callback = broken
    try:
        checkpoints.offer(3, make_state(mesh, seed=3), make_record(3), final=True)
    except SaveFailed as error:
        return str(error)


def restore(folder, mesh):
    rejected = []
    try:
        state, record = restore_newest(folder, make_abstract(mesh), lambda step, _: rejected.append(step))
    except (DamagedCheckpoint, StateMismatch) as error:
        return type(error).__name__
    return {"step": record.step, "wrong": same_bits(state, seed=record.step), "rejected": rejected}


def run_directory(folder, mesh):
    assert mesh.size == jax.device_count()
    run = open_run(config.Config("test", config.ModelConfig(), run=config.RunConfig(dir=str(folder))), world)
    run.begin({})
    barrier(world, "begun")
    try:
        open_run(config.Config("other", config.ModelConfig(), run=config.RunConfig(dir=str(folder))), world)
    except RunDirectoryError as error:
        refused = str(error)
    if world.is_writer:
        JsonlMetrics(run.metrics).write({"step": 1, "epoch": run.epoch})
    barrier(world, "written")
    run.close()
    return {"epoch": run.epoch, "refused": "in use" in refused}


world = join(parse_distributed(sys.argv[1]))
mesh = make_mesh(**json.loads(sys.argv[4]))
with jax.set_mesh(mesh):
    answer = globals()[sys.argv[2]](Path(sys.argv[3]), mesh)
print(json.dumps(answer), flush=True)
leave(world)
# A thread of XLA that still lets go of a host buffer aborts a Python that is shutting down (seen in 3 of 85 exits).
os._exit(0)
