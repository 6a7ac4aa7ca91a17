"""ZeRO levels: the same training whatever devices share, the bytes of the formula, and the collectives of each level.

Formula (Rajbhandari et al. 2020, figure 1), for N weights in w bytes, gradients in g bytes and AdamW's two moments in
float32 over Z devices of `fsdp`:

    level 1   w N       g N        8 N / Z
    level 2   w N       g N / Z    8 N / Z
    level 3   w N / Z   g N / Z    8 N / Z
"""

import dataclasses
import math
import sys
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import axes, tree
from jaxscale.audit import AuditError, audit
from jaxscale.config import Config, MeshConfig, OptimConfig, PrecisionConfig, RematConfig
from jaxscale.mesh import mesh_sizes
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.parallel.across_config import AcrossConfig
from jaxscale.parallel.gradient_exchange import reduced_gradients
from jaxscale.parallel.local_config import LocalConfig
from jaxscale.plan.make import make_plan
from jaxscale.plan.program_text import read_program
from jaxscale.plan.traffic import transfers
from jaxscale.state_config import StateConfig
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "parity"), str(TESTS / "contracts")]
import dlrm_parity  # noqa: E402 - beside the parity tests
from parity_run import mesh_of, parity_config, parity_run  # noqa: E402
from programs import abstract_batch, trace_step  # noqa: E402 - beside the contracts

Z = 8
ALL = {"data": 2, "fsdp": 2, "tensor": 2}
SHARED = {1: (), 2: ("gradients",), 3: ("gradients", "parameters")}
"""What devices share at each level, beside the optimizer's state."""
SMALL = Config(
    "zero",
    TransformerConfig(vocabulary=512, layers=4, width=64, heads=8, kv_heads=4, mlp=128),
    precision=PrecisionConfig(compute="float32"),
    remat=RematConfig("none"),
)
SMALL = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, path="builtin", sequence=64, batch=16))


def at(config, level):
    return dataclasses.replace(config, state=StateConfig(zero=level))


@lru_cache
def one_device(optimizer="adamw", recipe="lm_parity"):
    return parity_run(parity_config(optimizer, recipe=recipe), {})


def assert_same_losses(result, reference, rtol=1e-6):
    np.testing.assert_allclose(result["losses"], reference["losses"], rtol=rtol)
    np.testing.assert_allclose(result["norms"], reference["norms"], rtol=10 * rtol)


@pytest.mark.parametrize(
    ("level", "sizes", "changes"),
    [
        (1, {"fsdp": 8}, {"optimizer": "sgd"}),
        (2, {"fsdp": 8}, {"optimizer": "sgd"}),
        pytest.param(1, ALL, {"microbatches": 4, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param(2, ALL, {"microbatches": 4, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param(1, {"stage": 2, "fsdp": 4}, {"microbatches": 4}, marks=pytest.mark.slow),
        pytest.param(2, {"fsdp": 2, "context": 4}, {}, marks=pytest.mark.slow),
        pytest.param(2, {"fsdp": 4}, {"optimizer": "muon"}, marks=pytest.mark.slow),
        pytest.param(1, {"fsdp": 4}, {"optimizer": "adafactor"}, marks=pytest.mark.slow),
        pytest.param(1, {"expert": 2, "fsdp": 2}, {"recipe": "moe_parity"}, marks=pytest.mark.slow),
        pytest.param(2, {"expert": 2, "fsdp": 2}, {"recipe": "moe_parity"}, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_losses_are_those_of_one_device(level, sizes, changes):
    reference = one_device(**{k: v for k, v in changes.items() if k in ("optimizer", "recipe")})
    assert_same_losses(parity_run(at(parity_config(**changes), level), sizes), reference)


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2])
def test_a_model_with_tables(level):
    reference = dlrm_parity.dlrm_run(dlrm_parity.dlrm_config(), {})
    result = dlrm_parity.dlrm_run(at(dlrm_parity.dlrm_config(), level), {"fsdp": 8})
    np.testing.assert_allclose(result["loss"], reference["loss"], rtol=1e-6)


def expected_bytes(level, config, table):
    """The formula, per device; what no dim of is over `fsdp` (norm scales) is on all devices at every level."""
    split = sum(math.prod(p.shape) for p in table.values() if "embed" in p.axes)
    same = sum(math.prod(p.shape) for p in table.values() if "embed" not in p.axes)
    width = {"bfloat16": 2, "float32": 4}

    def held(name, nbytes):
        return nbytes * (split // (Z if name in SHARED[level] or name == "optimizer" else 1) + same)

    return {
        "parameters": held("parameters", width[config.precision.weights]),
        "optimizer": held("optimizer", 8),
        "gradients": held("gradients", width[config.precision.reduce]),
    }


def gradients_of(config, task, state, batch):
    return reduced_gradients(config, task, state, batch, jax.random.key(0), jax.numpy.int32(0), {})[1]


def bytes_of(values):
    """On the first device, of real arrays."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(values) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize(("level", "weights"), [(1, "bfloat16"), (2, "float32"), (3, "float32")])
def test_bytes_are_those_of_the_formula(level, weights):
    """Of real arrays after a step, of what a plan says, of the audit, and of the gradients that a program hands on."""
    config = at(dataclasses.replace(SMALL, precision=dataclasses.replace(SMALL.precision, weights=weights)), level)
    mesh = mesh_of({"fsdp": Z})
    with jax.set_mesh(mesh):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        expected = expected_bytes(level, config, task.parameters)
        state = jax.jit(lambda: init_state(config, task, optimizer))()
        gradients = jax.eval_shape(partial(gradients_of, config, task), state, abstract_batch(config, mesh))
        after = trace_step(config, mesh).out_info[0]
    assert jax.tree.map(lambda x: x.sharding.spec, after) == jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
    found = {"parameters": bytes_of(state["params"]), "optimizer": bytes_of(state["opt"])}
    reduced = {"bfloat16": 2, "float32": 4}[config.precision.reduce]
    shapes = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(gradients)]
    assert {**found, "gradients": sum(map(math.prod, shapes)) * reduced} == expected
    planned = make_plan(dataclasses.replace(config, mesh=MeshConfig(fsdp=Z)), compiles=False)
    assert dict(planned.held) == expected
    report = audit(task.parameters, mesh_sizes(mesh), config)
    assert sum(report.bytes_per_device.values()) == expected["parameters"]


@lru_cache
def step_transfers(level):
    mesh = mesh_of({"fsdp": Z})
    with jax.set_mesh(mesh):
        program = trace_step(at(SMALL, level), mesh).lower().compile().as_text()
    return [t for t in transfers(read_program(program), mesh_sizes(mesh)) if t.nbytes * t.times > 3000]


LAYER_WEIGHTS = 7  # q k v o gate up down
GROUPS_GATHER = 3  # targets, weights and hidden states: devices share the vocabulary
IN_LAYERS = {
    1: {"all-reduce": 1},  # XLA sums the gradients of a layer in one
    2: {"reduce-scatter": LAYER_WEIGHTS},
    3: {"all-gather": 2 * LAYER_WEIGHTS, "reduce-scatter": LAYER_WEIGHTS},
}
GATHERED_ONCE = {
    1: GROUPS_GATHER + (LAYER_WEIGHTS + 2) + 2,  # new weights; gradients of embedding and head come in shards
    2: GROUPS_GATHER + (LAYER_WEIGHTS + 2),
    3: GROUPS_GATHER,
}


@pytest.mark.parametrize("level", [1, 2, 3])
def test_collectives(level):
    """Below level 3 no layer gathers a weight: new weights are gathered once, behind the update, in their own dtype."""
    found = step_transfers(level)
    assert all(t.axes == ("fsdp",) for t in found)
    assert Counter(t.kind for t in found if t.in_loop) == IN_LAYERS[level]
    assert sum(t.kind == "all-gather" for t in found if not t.in_loop) == GATHERED_ONCE[level]
    with jax.set_mesh(mesh_of({"fsdp": Z})):
        table = SMALL.model.task(SMALL).parameters
    layers = 4 * sum(math.prod(p.shape) for path, p in table.items() if "embed" in p.axes and "layers" in p.axes)
    moved = {kind: sum(t.nbytes * t.times for t in found if t.in_loop and t.kind == kind) for kind in IN_LAYERS[level]}
    ways = {"all-gather": 2, "reduce-scatter": 1, "all-reduce": 1}
    norms = 4 * 2 * 4 * 64
    for kind, nbytes in moved.items():
        assert 0 <= nbytes - ways[kind] * layers <= norms, kind


def test_gradients_of_norms_and_their_weights_stay_whole():
    with jax.set_mesh(mesh_of({"fsdp": Z})):
        config = at(SMALL, 2)
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = jax.eval_shape(lambda: init_state(config, task, optimizer))
        for path, leaf in tree.flatten(state["params"]).items():
            assert leaf.sharding.spec == axes.gathered_spec(task.parameters[path].axes), path
        for path, leaf in tree.flatten(state["opt"]["mu"]).items():
            assert leaf.sharding.spec == axes.spec(*task.parameters[path].axes), path


@pytest.mark.parametrize(
    ("level", "sizes", "changes", "message"),
    [
        (2, {"stage": 2}, {}, "set state.zero to 1 or 3"),
        (1, {"data": 2}, {"across": AcrossConfig("int8")}, "across.gradients int8; set state.zero to 3"),
        (2, {"data": 2}, {"local": LocalConfig(every=2)}, "local.every 2; set state.zero to 3"),
    ],
)
def test_what_does_not_go_together_is_refused(level, sizes, changes, message):
    config = dataclasses.replace(at(SMALL, level), **changes, train=dataclasses.replace(SMALL.train, microbatches=4))
    parameters = SMALL.model.task(SMALL).parameters
    with pytest.raises(AuditError, match=message):
        audit(parameters, dict.fromkeys(axes.AXES, 1) | sizes, config)


def test_the_average_is_shared_too():
    """And a step that is not accepted changes nothing, at any level."""
    config = at(dataclasses.replace(SMALL, optim=OptimConfig(ema=0.9)), 1)
    with jax.set_mesh(mesh_of({"fsdp": Z})):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = jax.jit(lambda: init_state(config, task, optimizer))()
        assert bytes_of(state["ema"]) * 2 == bytes_of(state["opt"])
        batch = trace_step(config, mesh_of({"fsdp": Z})).in_avals[0][1]
        zeros = {k: jax.numpy.zeros(x.shape, x.dtype, out_sharding=x.sharding) for k, x in batch.items()}
        before = jax.device_get(state)
        state, metrics = make_step(config, task, optimizer)(state, zeros, jax.numpy.int32(0))
        assert int(metrics["skipped"]) == 1  # no token has weight: the loss is not finite
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), before["params"])
