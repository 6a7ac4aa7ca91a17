"""Chunked cross-entropy against the naive formula: values, gradients, meshes, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxscale import axes
from jaxscale.layers.vocabulary_groups import Groups
from jaxscale.ops.cross_entropy import chunk_size, cross_entropy

MESHES = [
    {},
    {"tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"context": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
]
GROUPED = [
    ({"fsdp": 4}, 1),
    ({"fsdp": 4}, 2),
    ({"fsdp": 4}, 4),
    ({"fsdp": 4, "tensor": 2}, 2),
    ({"fsdp": 2, "data": 2}, 2),
]
"""Meshes, and how many devices of fsdp share the vocabulary."""
FLOAT32 = {"compute_dtype": jnp.float32}


def make_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, axes.AXES, axis_types=(AxisType.Explicit,) * 6, devices=devices)


def inputs(B=4, S=8, D=16, V=32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, S, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    weight = rng.choice([0.0, 1.0, 0.5], (B, S)).astype(np.float32)
    return hidden, head, targets, weight


def naive(hidden, head, targets, weight, z_loss=0.0, softcap=0.0):
    logits = hidden @ head
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (weight * loss).sum(), (weight * z_loss * log_z**2).sum()


def place(mesh, hidden, head, targets, weight, tied=False, sequence="act_residual_sequence"):
    names = ("vocab", "embed") if tied else ("embed", "vocab")
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, axes.spec(*spec)))  # noqa: E731 - one-line helper
    return (
        put(hidden, "act_batch", sequence, None),
        put(head.T if tied else head, *names),
        put(targets, "act_batch", "act_sequence"),
        put(weight, "act_batch", "act_sequence"),
    )


def only(members):
    """The choice among groups, made for a test."""
    return lambda _tokens, _vocabulary, fsdp, _most: Groups(members, fsdp)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("sizes", "members"), [*((sizes, 0) for sizes in MESHES), *GROUPED], ids=str)
def test_equals_naive(sizes, members, chunk, tied, monkeypatch):
    if members:
        monkeypatch.setattr("jaxscale.ops.cross_entropy.head_groups", only(members))
    data, options = inputs(), {"z_loss": 1e-2, "softcap": 4.0}
    expected, expected_z = naive(*data, **options)
    gradients = jax.grad(lambda h, w: sum(naive(h, w, *data[2:], **options)), argnums=(0, 1))(*data[:2])
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        loss = functools.partial(cross_entropy, chunk=chunk, tied=tied, **FLOAT32, **options)
        args = place(mesh, *data, tied)
        total, metrics = jax.jit(loss)(*args)
        (total_too, metrics_too), (d_hidden, d_head) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            *args
        )
    np.testing.assert_allclose(total, expected + expected_z, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["z_loss"], expected_z, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], data[3].sum())
    np.testing.assert_allclose(total_too, total, rtol=1e-6)
    assert metrics.keys() == metrics_too.keys()
    for ours, reference, arg in ((d_hidden, gradients[0], args[0]), (d_head, gradients[1], args[1])):
        reference = reference.T if tied and arg is args[1] else reference
        assert np.linalg.norm(ours - reference) <= 1e-6 * np.linalg.norm(reference)
        assert ours.sharding == arg.sharding


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "softcap": 2.0, "chunk": 3}], ids=str)
def test_gradients_are_derivatives(sizes, options):
    """By hidden, head and loss_weight: numerically, without a reference implementation."""
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        hidden, head, targets, weight = place(mesh, *inputs(B=4, S=4, D=4, V=8))

        def loss(hidden, head, weight):
            return cross_entropy(hidden, head, targets, weight, **FLOAT32, **options)[0] * 3.0

        check_grads(jax.jit(loss), (hidden, head, weight), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_sequence_need_not_be_sharded_over_tensor():
    data, mesh = inputs(), make_mesh(context=2, tensor=2)
    with jax.set_mesh(mesh):
        gradients = []
        for sequence in ("act_sequence", "act_residual_sequence"):
            hidden, *rest = place(mesh, *data, sequence=sequence)
            gradients.append(jax.jit(jax.grad(lambda h, *rest: cross_entropy(h, *rest, **FLOAT32)[0]))(hidden, *rest))
            assert gradients[-1].sharding == hidden.sharding
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_huge_logits_do_not_overflow():
    hidden, head, targets, weight = inputs()
    mesh = make_mesh(tensor=2)
    with jax.set_mesh(mesh):
        args = place(mesh, hidden * 1e3, head, targets, weight)
        (total, _), gradients = jax.jit(
            jax.value_and_grad(functools.partial(cross_entropy, **FLOAT32), argnums=(0, 1), has_aux=True)
        )(*args)
    np.testing.assert_allclose(total, naive(hidden * 1e3, head, targets, weight)[0], rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_computes_with_float32_logits_and_gradient_sums():
    data, mesh = inputs(B=8, S=16), make_mesh(fsdp=4)
    with jax.set_mesh(mesh):
        hidden, *rest = place(mesh, *data)
        loss = functools.partial(cross_entropy, chunk=4)
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (total, _), (d_hidden, d_head) = run(hidden.astype(jnp.bfloat16), *rest)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in data[:2]]
    expected, reference = jax.value_and_grad(lambda w: naive(rounded[0], w, *data[2:])[0])(rounded[1])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert (total.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert np.linalg.norm(d_head - reference) < 3e-3 * np.linalg.norm(reference)


def test_logits_are_computed_once():
    """Three matmuls when differentiated (logits and two gradients), one when not."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        args = place(mesh, *inputs())
        loss = functools.partial(cross_entropy, chunk=4)
        assert str(jax.make_jaxpr(loss)(*args)).count("dot_general[") == 1
        assert str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1), has_aux=True))(*args)).count("dot_general[") == 3


def collectives(sizes, data, **options):
    """Kinds of the compiled forward and backward pass's collectives."""
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        loss = functools.partial(cross_entropy, **FLOAT32, **options)
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        text = gradient.lower(*place(mesh, *data)).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    return sorted(re.findall(rf" ({kinds})(?:-start)?\(", text))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, []),
        ({"data": 2}, ["all-reduce"]),  # sums and head gradient, combined by the compiler
        # hidden; largest logit, (denominator, target logit); hidden gradient
        ({"tensor": 4}, ["all-gather", "all-reduce", "all-reduce", "reduce-scatter"]),
    ],
    ids=str,
)
def test_collectives(sizes, expected):
    assert collectives(sizes, inputs(B=8), chunk=4) == expected


def test_a_shared_vocabulary_is_never_gathered(monkeypatch):
    """With all of fsdp in one group the head goes from columns to rows and back; with none it is gathered."""
    data = inputs(B=8, S=4, D=16, V=64)
    monkeypatch.setattr("jaxscale.ops.cross_entropy.head_groups", only(1))
    assert collectives({"fsdp": 8}, data) == ["all-gather", "all-reduce", "reduce-scatter"]
    monkeypatch.setattr("jaxscale.ops.cross_entropy.head_groups", only(8))
    found = collectives({"fsdp": 8}, data)
    # targets, weights, hidden; largest logit, (denominator, target logit), sums; hidden gradient
    assert found == ["all-gather"] * 3 + ["all-reduce"] * 3 + ["all-to-all"] * 2 + ["reduce-scatter"]


def test_reduce_dtype_is_the_dtype_of_the_sum_over_devices():
    mesh = make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        args = place(mesh, *inputs())
        for dtype, name in ((jnp.float32, "f32"), (jnp.bfloat16, "bf16")):
            loss = functools.partial(cross_entropy, reduce_dtype=dtype, most_members=1)
            jaxpr = str(jax.make_jaxpr(jax.grad(loss, argnums=1, has_aux=True))(*args))
            assert re.search(rf"{name}\[8,32\]\S* = reduce_scatter", jaxpr), jaxpr


@pytest.mark.parametrize("tied", [False, True])
def test_full_logits_never_exist(tied):
    """4096 tokens of a 128k vocabulary have 2 GiB of float32 logits; all temporaries together stay far below."""
    S, D, V = 4096, 16, 1 << 17
    with jax.set_mesh(make_mesh()):
        shapes = (
            jax.ShapeDtypeStruct((1, S, D), jnp.float32),
            jax.ShapeDtypeStruct((V, D) if tied else (D, V), jnp.float32),
            jax.ShapeDtypeStruct((1, S), jnp.int32),
            jax.ShapeDtypeStruct((1, S), jnp.float32),
        )
        loss = functools.partial(cross_entropy, chunk=128, tied=tied, z_loss=1e-4, **FLOAT32)
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        analysis = gradient.lower(*shapes).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 4 * S * V / 8


def test_chunk_size():
    assert chunk_size(tokens=2048, vocabulary=512, chunk=0) == (1, 2048)
    assert chunk_size(tokens=4096, vocabulary=1 << 17, chunk=0) == (4, 1024)
    assert chunk_size(tokens=10, vocabulary=512, chunk=4) == (3, 4)
    assert chunk_size(tokens=9, vocabulary=512, chunk=8) == (2, 5)  # even chunks rather than 8 and 1
    assert chunk_size(tokens=3, vocabulary=512, chunk=8) == (1, 3)
    assert chunk_size(tokens=3, vocabulary=1 << 30, chunk=0) == (3, 1)


def test_refuses_what_does_not_fit():
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        hidden, head, targets, weight = place(mesh, *inputs())
        with pytest.raises(ValueError, match=r"hidden \(4, 8, 16\), head of width 32 and vocabulary 16"):
            cross_entropy(hidden, head, targets, weight, tied=True)
        with pytest.raises(ValueError, match=r"targets \(4, 7\)"):
            cross_entropy(hidden, head, targets[:, 1:], weight)
        with pytest.raises(ValueError, match=r"chunk \(-1\)"):
            cross_entropy(hidden, head, targets, weight, chunk=-1)


def test_works_inside_a_region_manual_over_stage():
    data, mesh = inputs(), make_mesh(stage=2, fsdp=2, tensor=2)
    expected = jax.grad(lambda h: naive(h, *data[1:])[0])(data[0])
    with jax.set_mesh(mesh):

        def gradient(*args):
            return jax.grad(lambda h: cross_entropy(h, *args[1:], **FLOAT32)[0])(args[0])

        staged = jax.shard_map(gradient, in_specs=P(), out_specs=P(), axis_names={"stage"}, check_vma=False)
        np.testing.assert_allclose(jax.jit(staged)(*place(mesh, *data)), expected, atol=1e-5)
