"""A process is killed at random moments of its saves: what was committed loads exactly, the rest does not exist."""

import random
import subprocess
import sys
import time
from pathlib import Path

import jax
from states import make_abstract, make_mesh, same_bits

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.restore import restore_newest

SCRIPT = Path(__file__).parent / "save_for_ever.py"


def test_killed_in_mid_save_the_newest_committed_step_loads_exactly(tmp_path):
    chance = random.Random(0)
    mesh = make_mesh(fsdp=4, tensor=2)
    newest = 0
    with jax.set_mesh(mesh):
        for _ in range(4):
            writer = subprocess.Popen(
                [sys.executable, SCRIPT, tmp_path, str(newest)], stdout=subprocess.PIPE, text=True
            )
            try:
                said = int(writer.stdout.readline())
                time.sleep(chance.uniform(0, 0.3))
            finally:
                writer.kill()
                said = max([said, *map(int, writer.stdout.read().split())])
                writer.wait()
                writer.stdout.close()
            state, record = restore_newest(tmp_path, make_abstract(mesh))
            assert record.step in (said, said + 1), "a step that was announced is there; the next may just have made it"
            assert same_bits(state, seed=record.step) == []
            newest = record.step
    leftovers = set(layout.numbered(tmp_path)) - set(layout.list_steps(tmp_path))
    assert all(step >= newest - 2 for step in leftovers), "litter of earlier kills is gone"
