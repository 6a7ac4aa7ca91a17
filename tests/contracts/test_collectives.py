"""Forward and backward of each parallelism have exactly the collectives declared here, and XLA never gives up.

A loop's body stands in the program once, so the counts are those of one layer plus what is outside the layers:

    fsdp    every weight is gathered for the forward and again for the backward pass, its gradient scattered once;
            the embedding is gathered once, and so is the head (the loss computes its gradients together with the
            logits) unless devices share the vocabulary, which the sizes decide: then tokens are brought together
    data    every weight's gradient is summed once; together with fsdp only the shards that fsdp left
    tensor  forward: the input of attention and of the MLP gathered, their outputs scattered; backward: the same
            mirrored, and the inputs of the weight gradients gathered again; embedding and head add one of each

Microbatches are a loop around all that, a tied head is gathered and summed on its own, and full rematerialisation adds
one collective: the output of attention is scattered again. What else it repeats the backward pass does anyway.
"""

import dataclasses
import re

import jax
import pytest
from programs import lower_evaluation, lower_gradients, trace_step

from jaxscale import axes
from jaxscale.config import Config, DataConfig, PrecisionConfig, RematConfig, TrainConfig
from jaxscale.layers.vocabulary_groups import head_groups
from jaxscale.mesh import mesh_sizes
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.testing.hlo import by_axis, collectives

CONFIG = Config(
    "contract",
    TransformerConfig(vocabulary=512, layers=4, width=64, heads=8, kv_heads=4, mlp=128),
    data=DataConfig(path="builtin", sequence=64, batch=16),
    precision=PrecisionConfig(compute="float32"),
    remat=RematConfig("none"),
)
LAYER_WEIGHTS = 7  # q k v o gate up down
NORMS = 3  # two in a layer, one at the end
TOTALS = 2  # the batch's weight, and the sums of the metrics

ALL_ROWS = ("data", "fsdp")
DECLARED = {
    "data": {("all-reduce", ("data",)): LAYER_WEIGHTS + 2 + NORMS + TOTALS},
    "fsdp": {
        ("all-gather", ("fsdp",)): 2 * LAYER_WEIGHTS + 2,
        ("reduce-scatter", ("fsdp",)): LAYER_WEIGHTS + 2,
        ("all-reduce", ("fsdp",)): NORMS + TOTALS,
    },
    "tensor": {
        ("all-gather", ("tensor",)): 8,
        ("reduce-scatter", ("tensor",)): 6,
        ("all-reduce", ("tensor",)): NORMS + 2,  # the loss's maximum and sums over the vocabulary
    },
    "all": {
        ("all-gather", ("fsdp",)): 2 * LAYER_WEIGHTS + 2,
        ("reduce-scatter", ("fsdp",)): LAYER_WEIGHTS + 2,
        ("all-reduce", ("data",)): LAYER_WEIGHTS + 2,
        ("all-reduce", ALL_ROWS): NORMS + TOTALS,
        ("all-gather", ("tensor",)): 8,
        ("reduce-scatter", ("tensor",)): 6,
        ("all-reduce", ("tensor",)): NORMS + 2,
    },
}
MESHES = {"data": {"data": 8}, "fsdp": {"fsdp": 8}, "tensor": {"tensor": 4}}
MESHES["all"] = {"data": 2, "fsdp": 2, "tensor": 2}
GIVES_UP = re.compile("involuntary full rematerialization", re.IGNORECASE)


@pytest.fixture
def compiles_afresh():
    """A program out of the cache prints nothing: what the compiler says is heard only when it compiles."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax._src.compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax._src.compilation_cache.reset_cache()


def mesh_of(sizes):
    count = 1
    for size in sizes.values():
        count *= size
    return jax.make_mesh(tuple(sizes.get(a, 1) for a in axes.AXES), axes.AXES, devices=jax.devices()[:count])


def declared(config, name):
    """DECLARED, and what it costs that groups of devices share the vocabulary."""
    found, sizes = dict(DECLARED[name]), {"data": 1, "fsdp": 1, "tensor": 1} | MESHES[name]
    tokens = config.data.batch * config.data.sequence // (sizes["data"] * sizes["fsdp"]) // config.train.microbatches
    groups = head_groups(tokens, config.model.vocabulary // sizes["tensor"], sizes["fsdp"])
    if groups.count > 1:
        whole = groups.between == 1  # no group has to fetch the head's columns from another
        found["all-gather", ("fsdp",)] += 3 - whole  # targets, weights and hidden states
        found["all-reduce", ("fsdp",)] = found.get(("all-reduce", ("fsdp",)), 0) + 2  # maximum, sums
        found["reduce-scatter", ("fsdp",)] += 1 - whole  # the gradient of the hidden states
        found["all-to-all", ("fsdp",)] = 2 * groups.count  # the head and its gradient, an array for each device
    elif config.model.tied and sizes["fsdp"] > 1:
        found["all-gather", ("fsdp",)] -= 1  # one gather of the table is enough
    if config.remat.policy == "full" and "tensor" in MESHES[name]:
        found["reduce-scatter", ("tensor",)] += 1
    return found


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.usefixtures("compiles_afresh")
def test_forward_and_backward(name, capfd):
    mesh = mesh_of(MESHES[name])
    with jax.set_mesh(mesh):
        text = lower_gradients(CONFIG, mesh).compile().as_text()
    found = collectives(text, mesh_sizes(mesh))
    assert by_axis(found) == declared(CONFIG, name)
    assert not GIVES_UP.search(capfd.readouterr().err)


VARIANTS = {
    "microbatches": dataclasses.replace(CONFIG, train=TrainConfig(microbatches=2)),
    "remat": dataclasses.replace(CONFIG, remat=RematConfig("full")),
    "tied": dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, tied=True)),
}
VARIANTS["all of it"] = dataclasses.replace(
    VARIANTS["tied"], remat=RematConfig("full"), train=TrainConfig(microbatches=2)
)


@pytest.mark.parametrize(
    ("variant", "name"),
    [*((variant, "all") for variant in VARIANTS), *(("all of it", name) for name in ("data", "fsdp", "tensor"))],
)
def test_forward_and_backward_of(variant, name):
    """With microbatches no row moves: the batch's axes stay on the rows, off the dim that the scan runs over."""
    config, mesh = VARIANTS[variant], mesh_of(MESHES[name])
    with jax.set_mesh(mesh):
        text = lower_gradients(config, mesh).compile().as_text()
    assert by_axis(collectives(text, mesh_sizes(mesh))) == declared(config, name)


def test_dtypes_on_the_wire():
    """bfloat16 on the way in (the cast comes before the gather), float32 on the way out."""
    config = Config(CONFIG.name, CONFIG.model, data=CONFIG.data, precision=PrecisionConfig(compute="bfloat16"))
    mesh = mesh_of({"fsdp": 8})
    with jax.set_mesh(mesh):
        lowered = lower_gradients(config, mesh).as_text()
    moved = re.findall(r'"stablehlo.reduce_scatter".*?\}\) : \(tensor<([^>]*)>', lowered, re.DOTALL)
    hidden = [shape for shape in moved if shape.endswith("bf16")]  # its gradient, as of every layer's input
    assert len(moved) == LAYER_WEIGHTS + 2 + len(hidden)
    assert all(shape.endswith("f32") for shape in moved if shape not in hidden), moved
    assert hidden == ["2x128x64xbf16"], "groups of two devices, 128 tokens each, width 64"
    gathered = re.findall(r"sdy.sharding_constraint .* : tensor<(64x128x\w+)>", lowered)  # the MLP's gate and up
    assert "64x128xbf16" in gathered


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
@pytest.mark.usefixtures("compiles_afresh")
def test_no_step_makes_xla_give_up(optimizer, capfd):
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, name=optimizer, ema=0.99))
    mesh = mesh_of(MESHES["all"])
    with jax.set_mesh(mesh):
        trace_step(config, mesh).lower().compile()
    assert not GIVES_UP.search(capfd.readouterr().err)


@pytest.mark.usefixtures("compiles_afresh")
def test_no_realistic_program_makes_xla_give_up(capfd):
    """As recipes of real models are: bfloat16, everything recomputed, microbatches, and a model with every option."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(
            CONFIG.model, tied=True, qk_norm=True, window=(16, 0), attention_softcap=4.0, logit_softcap=8.0
        ),
        train=TrainConfig(microbatches=2, z_loss=1e-4),
        precision=PrecisionConfig(compute="bfloat16"),
        remat=RematConfig("full"),
    )
    mesh = mesh_of(MESHES["all"])
    with jax.set_mesh(mesh):
        trace_step(config, mesh).lower().compile()
        lower_evaluation(config, mesh).compile()
    assert not GIVES_UP.search(capfd.readouterr().err)


@pytest.mark.usefixtures("compiles_afresh")
def test_the_message_would_be_heard(capfd):
    """The gradient of a lookup in a table sharded over two axes is the known way to it."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    stored = jax.NamedSharding(mesh, jax.P("a", "b"))
    table = jax.ShapeDtypeStruct((64, 32), "float32", sharding=stored)
    index = jax.ShapeDtypeStruct((8, 16), "int32", sharding=jax.NamedSharding(mesh, jax.P(("b", "c"), None)))
    gradient = jax.jit(lambda t, i: jax.grad(lambda t: (t[i] ** 2).sum())(t), out_shardings=stored)
    gradient.lower(table, index).compile()
    assert GIVES_UP.search(capfd.readouterr().err)
