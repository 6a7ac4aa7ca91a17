"""Saves step after step until it is killed, and prints each step once it is committed. Used by test_kill.py."""

import sys
from pathlib import Path

import jax
from states import make_mesh, make_record, make_state

from jaxscale.checkpoint.durable import DurableCheckpoints

jax.config.update("jax_num_cpu_devices", 2)
mesh = make_mesh(fsdp=2)
jax.set_mesh(mesh)
start = int(sys.argv[2])
checkpoints = DurableCheckpoints(Path(sys.argv[1]), every=1, keep=2)
for step in range(start + 1, start + 100_000):
    checkpoints.offer(step, make_state(mesh, seed=step), make_record(step), final=True)
    print(step, flush=True)
