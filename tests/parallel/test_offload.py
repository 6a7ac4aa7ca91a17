"""State and activations in the hosts' memory: the same bits as without, in memory of the kind that was asked for.

CPU devices have that kind too (`pinned_host`), so programs, states and checkpoints are the real ones; that device
memory is saved is read from programs compiled for TPUs.
"""

import dataclasses
import math
import sys
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxscale import axes, host_memory, remat, tree
from jaxscale.audit import AuditError, audit
from jaxscale.config import (
    Config,
    ConfigError,
    MeshConfig,
    OptimConfig,
    PrecisionConfig,
    RematConfig,
    TrainConfig,
)
from jaxscale.data.loader import Loader
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.parallel.local_config import LocalConfig
from jaxscale.plan.make import make_plan
from jaxscale.plan.report import json_of, text_of
from jaxscale.state_config import StateConfig
from jaxscale.train.evaluate import make_evaluate
from jaxscale.train.state import abstract_state, init_state
from jaxscale.train.step import make_step
from jaxscale.train.tables import weights_of

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "parity"))
from parity_run import mesh_of  # noqa: E402 - beside the parity tests

BASE = Config(
    "offload",
    TransformerConfig(vocabulary=512, layers=2, width=64, heads=8, kv_heads=4, mlp=128),
    steps=3,
    optim=OptimConfig(ema=0.9),
    train=TrainConfig(microbatches=2),
    precision=PrecisionConfig(compute="float32"),
    remat=RematConfig("full"),
)
BASE = dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, path="builtin", sequence=64, batch=16))
SIZES = (("fsdp", 2),)
ALL = ("opt", "ema", "params")


def offloaded(config=BASE, state=ALL, activations=("layer_input",)):
    moved = dataclasses.replace(config.remat, offload=activations)
    return dataclasses.replace(config, state=StateConfig(offload=state), remat=moved)


@lru_cache
def run(config, sizes=SIZES):
    """(losses of three steps, the state behind them, loss of an evaluation)."""
    mesh = mesh_of(dict(sizes))
    with jax.set_mesh(mesh):
        task = config.model.task(config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = jax.jit(lambda: init_state(config, task, optimizer))()
        step, losses = make_step(config, task, optimizer), []
        with Loader(config, config.model.source(config), mesh) as loader:
            for number, _, _, batch in loader:
                state, metrics = step(state, batch, np.int32(number))
                losses.append(float(metrics["loss"]))
        evaluated = float(make_evaluate(task)(weights_of(state), batch)["loss"])
        wanted = abstract_state(config, task, optimizer)
    return losses, tree.flatten(state), evaluated, tree.flatten(wanted)


def assert_same(config, reference=BASE, sizes=SIZES):
    losses, state, evaluated, _ = run(config, sizes)
    before, expected, evaluated_before, _ = run(reference, sizes)
    assert losses == before
    assert evaluated == evaluated_before
    for path, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(state[path]), np.asarray(leaf), err_msg=path)


def test_everything_on_the_host_trains_the_same_bits():
    assert_same(offloaded())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "activations", "policy"),
    [
        (("opt",), (), "full"),
        (("ema",), (), "none"),
        (("params",), (), "full"),
        ((), ("layer_input", "attention"), "full"),
        ((), ("layer_input",), "names"),
    ],
    ids=str,
)
def test_parts_of_it(state, activations, policy):
    base = dataclasses.replace(BASE, remat=RematConfig(policy))
    assert_same(offloaded(base, state, activations), base)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["experts", "stages", "whole weights"])
def test_with_other_parallelisms(model):
    config, state, sizes = BASE, ALL, {"expert": 2, "fsdp": 2}
    if model == "experts":
        experts = ExpertsConfig(count=4, top_k=2, balance_loss=0.01, dispatch="ragged")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, experts=experts))
    elif model == "stages":
        state, sizes = ("opt", "ema"), {"stage": 2, "fsdp": 2}
    else:
        config = dataclasses.replace(config, state=StateConfig(zero=2))
        state = ("opt", "ema")
    moved = offloaded(config, state)
    moved = dataclasses.replace(moved, state=dataclasses.replace(moved.state, zero=config.state.zero))
    assert_same(moved, config, tuple(sizes.items()))


def test_what_is_named_lies_on_the_host():
    """Of the weights those that are multiplied layer by layer; and the abstract state says it as the arrays do."""
    _, state, _, wanted = run(offloaded())
    on_host = {path for path, leaf in state.items() if leaf.sharding.memory_kind == host_memory.HOST}
    assert on_host == {path for path, leaf in wanted.items() if host_memory.is_on_host(leaf)}
    weights = {f"params/layers/{w}" for w in [*(f"attention/{n}" for n in "qkvo"), "mlp/gate", "mlp/up", "mlp/down"]}
    assert on_host == weights | {path for path in state if path.startswith(("opt/", "ema/"))}
    assert not any(leaf.sharding.memory_kind == host_memory.HOST for leaf in run(BASE)[1].values())


def test_plan_and_summary_count_it_apart():
    sizes = MeshConfig(fsdp=2)
    plain, moved = (make_plan(dataclasses.replace(c, mesh=sizes), compiles=False) for c in (BASE, offloaded()))
    _, _, _, wanted = run(offloaded())
    nbytes = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in wanted.values() if host_memory.is_on_host(x))
    assert moved.on_host == nbytes == sum(plain.held.values()) - sum(moved.held.values())
    assert moved.held["optimizer"] == moved.held["moving average"] == 0 < moved.held["parameters"]
    assert moved.held["gradients"] == plain.held["gradients"]
    assert "in the host's memory" in text_of(moved)
    assert "in the host's memory" not in text_of(plain)
    assert json_of(moved)["host_bytes"] == nbytes


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (dataclasses.replace(offloaded(state=("ema",)), optim=OptimConfig()), {}, "optim.ema is 0"),
        (offloaded(state=("params",)), {"stage": 2}, "does not go with mesh.stage"),
        (dataclasses.replace(offloaded(state=("opt",)), local=LocalConfig(every=2)), {"data": 2}, "local.every 2"),
    ],
)
def test_what_does_not_go_together_is_refused(config, sizes, message):
    with pytest.raises(AuditError, match=message):
        audit(BASE.model.task(BASE).parameters, dict.fromkeys(axes.AXES, 1) | sizes, config)


def test_fields_check_themselves():
    with pytest.raises(ConfigError, match=r"set state\.zero to 3"):
        StateConfig(zero=1, offload=("params",))
    with pytest.raises(ConfigError, match="once"):
        StateConfig(offload=("opt", "opt"))
    with pytest.raises(ConfigError, match=r"remat\.policy full or names, not dots"):
        RematConfig("dots", offload=("mlp",))
    with pytest.raises(ConfigError, match="both have mlp"):
        RematConfig("names", names=("mlp",), offload=("mlp",))
    with pytest.raises(ConfigError, match=r"remat\.offload has 'input'"):
        remat.check(RematConfig(offload=("input",)))


class WithoutHostMemory:
    device_kind = "abacus"

    def addressable_memories(self):
        return [type("Memory", (), {"kind": "device"})()]


def test_devices_that_reach_no_host_memory_are_refused():
    for config in (offloaded(), offloaded(state=()), dataclasses.replace(BASE, remat=RematConfig("offload"))):
        with pytest.raises(ConfigError, match="pinned_host, and abacus devices have device"):
            host_memory.check(config, [WithoutHostMemory()])
        host_memory.check(config, jax.devices())
    host_memory.check(BASE, [WithoutHostMemory()])
