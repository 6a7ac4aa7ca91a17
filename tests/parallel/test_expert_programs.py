"""What programs with experts consist of: all-to-alls and no gather of experts, and the TPU's own ragged operations."""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import pytest

from jaxscale import axes
from jaxscale.audit import AuditError, audit
from jaxscale.config import Config, DataConfig, MeshConfig, OptimConfig, PrecisionConfig, RematConfig
from jaxscale.mesh import abstract_mesh_for, mesh_sizes
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.testing.hlo import by_axis, collectives
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

ROOT = Path(__file__).parents[2]
for folder in ("contracts", "parity", "parallel"):
    sys.path.insert(0, str(ROOT / "tests" / folder))
from parity_run import mesh_of  # noqa: E402
from programs import lower_gradients  # noqa: E402
from test_expert_parity import batch_of  # noqa: E402
from test_expert_parity import config_of as small  # noqa: E402

EXPERTS = ExpertsConfig(count=8, balance_loss=0.01, bias_step=1e-3)
CONFIG = Config(
    "contract",
    TransformerConfig(vocabulary=512, layers=4, width=64, heads=8, kv_heads=4, mlp=96, experts=EXPERTS),
    data=DataConfig(path="builtin", sequence=64, batch=16),
    precision=PrecisionConfig(compute="float32"),
    remat=RematConfig("none"),
)
MOVES = 4
"""To the experts and back, forward and backward."""


def test_tokens_move_and_experts_stay():
    sizes = {"expert": 4, "fsdp": 2}
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        text = lower_gradients(CONFIG, mesh).compile().as_text()
    found = collectives(text, mesh_sizes(mesh))
    over_expert = {kind for kind, mesh_axes in by_axis(found) if "expert" in mesh_axes}
    assert over_expert == {"all-to-all", "all-reduce"}
    # An all-to-all over 4 devices is one operation of 4 operands.
    assert by_axis(found)["all-to-all", ("expert",)] == MOVES * 4
    # Of experts each device has a quarter, and their gradients cross `fsdp` alone.
    own = {8 // 4 * 64 * 96 // shards for shards in (1, 2)}
    moved = {(kind, mesh_axes) for kind, mesh_axes, shape in found if math.prod(shape) in own}
    assert moved == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))}


@pytest.mark.parametrize("sizes", [{"expert": 8}, pytest.param({"expert": 4, "tensor": 2}, marks=pytest.mark.slow)])
def test_a_tpu_gets_ragged_operations(sizes):
    model = dataclasses.replace(CONFIG.model, attention="xla")
    mesh = MeshConfig(**sizes)
    config = dataclasses.replace(CONFIG, model=model, on="v6e-16", mesh=mesh, data=DataConfig("builtin", batch=64))
    abstract = abstract_mesh_for(config)
    with jax.sharding.use_abstract_mesh(abstract):
        lowered = lower_gradients(config, abstract, platforms=("tpu",)).as_text()
    assert lowered.count("@ragged_all_to_all") == MOVES
    assert "chlo.ragged_dot" in lowered
    dense = dataclasses.replace(model, experts=dataclasses.replace(EXPERTS, capacity=1.25))
    with jax.sharding.use_abstract_mesh(abstract):
        program = lower_gradients(dataclasses.replace(config, model=dense), abstract, platforms=("tpu",)).as_text()
    assert "ragged" not in program
    assert "all_to_all" in program


def test_experts_that_do_not_divide_are_refused():
    table = CONFIG.model.task(CONFIG).parameters
    with pytest.raises(
        AuditError, match=r"mesh axis 'expert' \(3\) does not divide experts \(8\) of .*use 1, 2, 4 or 8"
    ):
        audit(table, dict.fromkeys(axes.AXES, 1) | {"expert": 3}, CONFIG)
    assert audit(table, dict.fromkeys(axes.AXES, 1) | {"expert": 4, "fsdp": 2}, CONFIG).bytes_per_device[
        "layers/experts/up"
    ] == 4 * (4 * 8 * 64 * 96 // 8)


def test_a_capacity_wants_rows_in_their_own_order():
    """Else which tokens are dropped would depend on the mesh."""
    sizes = {**dict.fromkeys(axes.AXES, 1), "context": 2}
    for form, refused in (("ring", True), ("ulysses", False)):
        model = TransformerConfig(experts=ExpertsConfig(count=4, top_k=2, capacity=1.25), context=form)
        config = Config("capacity", model, data=DataConfig(path="builtin"))
        with jax.sharding.use_abstract_mesh(axes.abstract_mesh(sizes)):
            parameters = model.task(config).parameters
        if refused:
            with pytest.raises(AuditError, match=r"use model\.context ulysses, or no"):
                audit(parameters, sizes, config)
        else:
            audit(parameters, sizes, config)


def test_flops_count_the_experts_that_a_token_uses():
    dense = dataclasses.replace(CONFIG.model, mlp=2 * 96, experts=ExpertsConfig())
    router = 6 * 4 * 64 * 8
    flops = CONFIG.model.task(CONFIG).flops_per_token(64)
    assert flops == dense.task(CONFIG).flops_per_token(64) + router
    shared = dataclasses.replace(CONFIG.model, experts=dataclasses.replace(EXPERTS, shared=1))
    assert shared.task(CONFIG).flops_per_token(64) == flops + 6 * 4 * 3 * 64 * 96


@pytest.mark.parametrize(
    "optimizer", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "adafactor", "sgd"))]
)
def test_every_optimizer_trains_experts_and_none_the_bias(optimizer):
    """The bias moves by its own step against the load, whatever the optimizer, its rate and clipping are."""
    config = dataclasses.replace(small(), optim=OptimConfig(name=optimizer, learning_rate=0.01, clip=1e-3))
    with jax.set_mesh(mesh_of({"expert": 4, "fsdp": 2})):
        task = config.model.task(config)
        made = make_optimizer(config.optim, task.parameters, config.steps)
        state = jax.jit(lambda: init_state(config, task, made))()
        before = jax.device_get(state["params"]["layers"])
        state, metrics = make_step(config, task, made)(state, batch_of(), jax.numpy.int32(10))
        after, metrics = jax.device_get((state["params"]["layers"], metrics))
    load = metrics["layers/load"]
    mean = load.mean(axis=1, keepdims=True)
    step = config.model.experts.bias_step * jax.numpy.sign(mean - load)
    assert (after["router"]["bias"] == before["router"]["bias"] + step).all()
    assert (step != 0).sum() > 8
    assert metrics["imbalance"] == pytest.approx((load.max(axis=1) / mean[:, 0]).mean(), rel=1e-6)
    assert 1 < metrics["imbalance"] < 8
    for name, value in before["experts"].items():
        assert (after["experts"][name] != value).any(), name
