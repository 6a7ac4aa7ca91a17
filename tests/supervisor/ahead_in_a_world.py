"""What one process of a world does in test_ahead.py: `... DISTRIBUTED ACTION FOLDER`, with two emulated devices each.

compile    compiles ahead, into a folder of this process's own, for a world of the first two processes
load       as a worker of that world: takes the programs from FOLDER, and compiles none
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax

from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.recipe import Hooks, load_recipe
from jaxscale.supervisor.ahead import CompileAhead
from jaxscale.supervisor.programs import StoredPrograms, program_identity
from jaxscale.world import join, leave, parse_distributed

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "lm_nano.py"
SMALLER = {"mesh": {"data": 2, "fsdp": 2}, "devices": 4, "processes": 2}


def never():
    raise AssertionError("it is compiled again")


world = join(parse_distributed(sys.argv[1]))
action, folder = sys.argv[2], Path(sys.argv[3])
config = load_recipe(RECIPE).config
config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out_documents=1))
if action == "compile":
    ahead = CompileAhead(config, Hooks(), folder / str(world.index), SMALLER)
    ahead.start(0, after_seconds=0.0)
    ahead._thread.join()
else:
    small = dataclasses.replace(config, mesh=MeshConfig(**SMALLER["mesh"]), devices=SMALLER["devices"])
    with jax.set_mesh(make_mesh(small)):
        programs = StoredPrograms(folder, program_identity(small, world.processes, jax.devices()))
        for name in ("train step 8x64", "evaluate 8x64"):
            programs.get(name, never)
print("done", flush=True)
leave(world)
os._exit(0)
