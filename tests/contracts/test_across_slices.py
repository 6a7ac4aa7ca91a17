"""What crosses from slice to slice: sums of gradients are hierarchical, and compression sends as little as it says.

Read from the compiled step on two slices of four devices: each collective over `data`, its bytes, and how often.
"""

import dataclasses
import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import pytest
from programs import abstract_batch

from jaxscale import axes
from jaxscale.config import Config, DataConfig, OptimConfig, PrecisionConfig, RematConfig, TrainConfig
from jaxscale.mesh import mesh_sizes
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.parallel.across_config import AcrossConfig
from jaxscale.parallel.gradient_exchange import RESIDUAL, RIGHT, exchange, init_across, reduced_gradients
from jaxscale.parallel.slices import EVERYWHERE, OWN, as_own, on_each_slice, own
from jaxscale.plan.collective_costs import sent_bytes
from jaxscale.plan.program_text import read_program
from jaxscale.plan.traffic import transfers
from jaxscale.train.state import abstract_state

CONFIG = Config(
    "slices",
    TransformerConfig(vocabulary=512, layers=4, width=128, heads=4, mlp=256),
    data=DataConfig(path="builtin", sequence=32, batch=8),
    optim=OptimConfig("sgd"),
    precision=PrecisionConfig(compute="float32"),
    remat=RematConfig("none"),
)
FSDP = 4
NORMS, SCALARS = 4 * (2 * 4 + 1) * 128, 64
"""Bytes of norm scales, which are on every device, and of sums of metrics and checks."""


def mesh():
    shape = tuple({"data": 2, "fsdp": FSDP}.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES)


def crossing(compiled):
    """Collectives of a program that cross slices."""
    program = read_program(compiled.as_text())
    return [t for t in transfers(program, mesh_sizes(mesh())) if "data" in t.axes]


@lru_cache
def of_gradients(kind, microbatches=1):
    """Of forward and backward with the sums of the gradients."""
    config = dataclasses.replace(CONFIG, across=AcrossConfig(kind), train=TrainConfig(microbatches=microbatches))
    here = mesh()
    with jax.set_mesh(here):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = abstract_state(config, task, optimizer)
        key = jax.eval_shape(lambda: jax.random.key(0))
        program = jax.jit(partial(reduced_gradients, config, task)).lower(
            state, abstract_batch(config, here), key, jnp.int32(0), {}
        )
        return crossing(program.compile())


@lru_cache
def of_exchange(kind):
    """Of the exchange alone."""
    across = AcrossConfig(kind)
    with jax.set_mesh(mesh()):
        task = CONFIG.model.task(CONFIG)
        table = task.parameters
        kept = jax.eval_shape(lambda: init_across(across, task, jax.random.key(1))).get("across", {})
        kept = {RESIDUAL: {}, RIGHT: {}, **kept}

        def body(params, kept, key):
            mine = {RESIDUAL: own(kept[RESIDUAL]), RIGHT: kept[RIGHT]}
            summed, mine = exchange(across, table, params, mine, key)
            return summed, {RESIDUAL: as_own(mine[RESIDUAL]), RIGHT: mine[RIGHT]}

        places = {RESIDUAL: OWN, RIGHT: EVERYWHERE}
        step = on_each_slice(body, (EVERYWHERE, places, EVERYWHERE), (EVERYWHERE, places))
        params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return crossing(jax.jit(step).lower(params, kept, key).compile())


def sent(found):
    """Bytes that each device sends to another slice in a step."""
    return sum(sent_bytes(t.kind, t.nbytes, 2) * t.times for t in found)


def weights():
    """Bytes of one device's shard of the weights in float32."""
    with jax.set_mesh(mesh()):
        table = CONFIG.model.task(CONFIG).parameters
    return 4 * sum(math.prod(p.shape) for p in table.values() if "embed" in p.axes) / FSDP


@pytest.mark.parametrize("kind", ["direct", "float32"])
def test_only_shards_cross_slices(kind):
    """Reduce-scatter inside, all-reduce of 1/fsdp across: whatever is as large as a whole weight stays inside."""
    found = of_gradients(kind)
    assert {t.kind for t in found} == {"all-reduce"}
    large = [t for t in found if t.nbytes * t.times > NORMS]
    assert all(t.axes == ("data",) for t in large)
    norms = sum(t.nbytes * t.times for t in found if t not in large)
    assert norms <= NORMS + SCALARS
    assert sum(t.nbytes * t.times for t in large) + norms == pytest.approx(weights() + NORMS, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "share"), [("bfloat16", 0.51), ("int8", 0.26), ("top-k", 0.03), ("random-k", 0.02), ("power-sgd", 0.15)]
)
def test_compression_sends_its_share(kind, share):
    """Of what float32 sends, beside norms.

    PowerSGD's share is rank 4 of matrices of 128 and 256, and its right factor is not split over `fsdp`.
    """
    whole = sent(of_exchange("float32")) - NORMS
    assert whole == pytest.approx(weights(), rel=0.02)
    ratio = (sent(of_exchange(kind)) - NORMS) / whole
    assert 0.4 * share < ratio <= share


def test_microbatches_are_sent_once():
    """`direct` sums over slices in each of them."""
    assert sent(of_gradients("int8", 4)) == pytest.approx(sent(of_exchange("int8")), rel=0.01)
