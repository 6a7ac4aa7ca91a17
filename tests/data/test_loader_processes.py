"""The loader in real worlds of 2 and 4 processes: together they hold the batches that one process holds."""

import json

import jax
import numpy as np
import pytest

from jaxscale import axes
from jaxscale.config import Config, DataConfig, ModelConfig, PhaseConfig
from jaxscale.data.corpora import open_corpora
from jaxscale.data.evaluation import evaluation_batches
from jaxscale.data.loader import Loader
from jaxscale.testing.processes import run_world

CONFIG = Config(
    "test",
    ModelConfig(),
    steps=3,
    data=DataConfig(path="builtin", sequence=32, batch=6, held_out_documents=2),
    phases=(PhaseConfig(2, sequence=64, batch=10),),
)

WORLD = """
import json, sys
import jax
from jaxscale import axes
from jaxscale.world import membership, parse_distributed
sys.path.insert(0, {here!r})
from test_loader_processes import CONFIG, batches_of, shards_of
with membership(parse_distributed(sys.argv[1])):
    mesh = jax.make_mesh(tuple({sizes!r}.get(axis, 1) for axis in axes.AXES), axes.AXES)
    print(json.dumps([shards_of(batch) for batch in batches_of(CONFIG, mesh)]))
"""


def shards_of(batch):
    """Name -> index -> values, of the shards in this process."""
    return {
        name: {str(shard.index): np.asarray(shard.data).tolist() for shard in value.addressable_shards}
        for name, value in batch.items()
    }


def batches_of(config, mesh):
    corpora = open_corpora(config)
    with Loader(config, corpora, mesh) as loader:
        yield from (step.batch for step in loader)
    yield from list(evaluation_batches(config, corpora, mesh))[-2:]


@pytest.mark.parametrize(("processes", "sizes"), [(2, {"fsdp": 2, "context": 2}), (4, {"fsdp": 2, "tensor": 4})])
def test_worlds_hold_what_one_process_holds(processes, sizes, request):
    devices = int(np.prod(list(sizes.values())))
    source = WORLD.format(here=str(request.path.parent), sizes=sizes)
    outcomes = run_world(source, processes, devices // processes)
    mesh = jax.make_mesh(tuple(sizes.get(a, 1) for a in axes.AXES), axes.AXES, devices=jax.devices()[:devices])
    reference = [shards_of(batch) for batch in batches_of(CONFIG, mesh)]
    assert len(reference) == 5
    covered = [{name: set() for name in batch} for batch in reference]
    for outcome in outcomes:
        for number, batch in enumerate(json.loads(outcome.stdout.splitlines()[-1])):
            for name, shards in batch.items():
                for index, data in shards.items():
                    assert data == reference[number][name][index], (outcome.index, number, name, index)
                    covered[number][name].add(index)
    assert covered == [{name: set(value) for name, value in batch.items()} for batch in reference]
