"""Attention over the mesh axis `context` in its three forms, against a plain float64 reference of whole rows."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.ops import attention_xla
from jaxscale.ops.attention import UnsupportedAttention, attention
from jaxscale.parallel import context
from jaxscale.testing.hlo import collectives

FORMS = ("ring", "gather", "ulysses")
SPLIT = P(axes.BATCH_AXES, "context", "tensor", None)
OPTIONS = [{}, {"window": 20, "softcap": 1.5}, {"window": 1}]


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[: int(np.prod(shape))])


def inputs(B=2, S=48, H=8, G=4, K=8, seed=0):
    """Queries, keys, values, a cotangent, and segment ids: documents of ragged lengths, then padding of id 0."""
    rng = np.random.default_rng(seed)
    q, k, v, cotangent = (rng.standard_normal((B, S, heads, K)).astype(np.float32) for heads in (H, G, G, H))
    ids = np.zeros((B, S), np.int32)
    for row in range(B):
        cuts = [0, *sorted(rng.choice(np.arange(2, S - 2), size=3, replace=False))]
        for number, (first, last) in enumerate(itertools.pairwise(cuts)):
            ids[row, first:last] = number + 1
    return q, k, v, cotangent, ids


def plain(q, k, v, cotangent, ids, window=0, softcap=0.0):
    """[output, gradients by q, k, v] in float64: the whole matrix of scores at once."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    repeats = q.shape[2] // k.shape[2]
    keys, values = np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2)
    scale, position = q.shape[3] ** -0.5, np.arange(q.shape[1])
    mask = position[:, None] >= position[None, :]
    if window:
        mask = mask & (position[:, None] - position[None, :] < window)
    mask = np.broadcast_to(mask, (q.shape[0], *mask.shape))
    if ids is not None:
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    raw = np.einsum("bshk,bthk->bhst", q, keys) * scale
    scores = softcap * np.tanh(raw / softcap) if softcap else raw
    weights = np.where(mask[:, None], np.exp(scores - scores.max()), 0)
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("bshk,bthk->bhst", cotangent, values)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    if softcap:
        of_scores = of_scores * (1 - np.tanh(raw / softcap) ** 2)

    def by_group(x):
        return x.reshape(*x.shape[:2], k.shape[2], repeats, x.shape[3]).sum(3)

    return [
        np.einsum("bhst,bthk->bshk", weights, values),
        np.einsum("bhst,bthk->bshk", of_scores, keys) * scale,
        by_group(np.einsum("bhst,bshk->bthk", of_scores, q)) * scale,
        by_group(np.einsum("bhst,bshk->bthk", weights, cotangent)),
    ]


def order_of(form, length, size):
    return context.order(length, size) if form in context.BALANCED and size > 1 else np.arange(length)


def pulled(form, **options):
    """(q, k, v, cotangent, ids) -> [output, gradients]"""

    def run(q, k, v, cotangent, ids):
        function = functools.partial(attention, segment_ids_BS=ids, implementation="xla", context=form, **options)
        out, of = jax.vjp(function, q, k, v)
        return [out, *of(cotangent)]

    return run


def on_mesh(mesh, form, arrays, **options):
    """The same as `plain`, in float32, by a form on a mesh; positions are put in the form's order and back."""
    q, k, v, cotangent, ids = arrays
    order = order_of(form, q.shape[1], mesh.shape["context"])
    back = np.argsort(order)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x[:, order], NamedSharding(mesh, SPLIT)) for x in (q, k, v, cotangent)]
        ids = None if ids is None else jax.device_put(ids[:, order], NamedSharding(mesh, P(*SPLIT[:2])))
        found = jax.jit(pulled(form, **options))(*placed, ids)
    assert all(x.sharding == NamedSharding(mesh, SPLIT) for x in found)
    return [np.asarray(x)[:, back] for x in found]


def assert_close(found, expected):
    for name, ours, theirs in zip(("output", "of q", "of k", "of v"), found, expected, strict=True):
        error = np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) or np.linalg.norm(expected[0]))
        assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_plain_reference(form, options):
    arrays = inputs()
    assert_close(on_mesh(mesh_of(context=4), form, arrays, **options), plain(*arrays, **options))


MESHES = [{"context": 2}, {"context": 8}, {"context": 2, "tensor": 2, "fsdp": 2}]


@pytest.mark.parametrize(
    ("form", "sizes"), [*((form, sizes) for form in FORMS for sizes in MESHES), ("ring", {"context": 3})], ids=str
)
def test_on_other_meshes(form, sizes):
    """On 2 devices without segment ids; on 8 with windows of neighbours only, and ulysses copies the 2 key heads."""
    q, k, v, cotangent, ids = inputs(G=2)
    arrays = (q, k, v, cotangent, ids if sizes != {"context": 2} else None)
    assert_close(on_mesh(mesh_of(**sizes), form, arrays, window=7), plain(*arrays, window=7))


def test_blocks_are_walked_in_parts(monkeypatch):
    """As where a block's scores would not fit into memory: 2 queries of a chunk at a time."""
    monkeypatch.setattr(attention_xla, "SCORE_BYTES", 4 * 2 * 8 * 6 * 2)
    arrays = inputs()
    for form in ("ring", "gather"):
        assert_close(on_mesh(mesh_of(context=4), form, arrays, softcap=2.0), plain(*arrays, softcap=2.0))


# What a program holds and moves

S, C = 184, 4  # a row of 184 positions: 46 on a device, 23 in a chunk; no other dim has these sizes


@functools.cache
def program(form):
    """The compiled forward and backward pass on 4 devices."""
    mesh = mesh_of(context=C)
    with jax.set_mesh(mesh):

        def shape(heads):
            return jax.ShapeDtypeStruct((2, S, heads, 8), np.float32, sharding=NamedSharding(mesh, SPLIT))

        ids = jax.ShapeDtypeStruct((2, S), np.int32, sharding=NamedSharding(mesh, P(*SPLIT[:2])))
        return jax.jit(pulled(form)).lower(shape(8), shape(4), shape(4), shape(8), ids).compile()


def moved(form):
    """kind of collective -> shapes of its results, all over `context`."""
    found = {}
    for kind, names, shape in collectives(program(form).as_text(), {"context": C}):
        assert names == ("context",)
        found.setdefault(kind, []).append(shape)
    return found


def test_the_ring_permutes_and_gathers_nothing():
    assert set(moved("ring")) == {"collective-permute"}


def test_ulysses_exchanges_heads_and_gathers_only_ids():
    found = moved("ulysses")
    assert set(found) == {"all-to-all", "all-gather"}
    assert {len(shape) for shape in found["all-gather"]} == {2}


def test_the_gather_form_gathers_keys_and_scatters_their_gradients():
    assert set(moved("gather")) == {"all-gather", "reduce-scatter"}


def test_no_device_of_the_ring_holds_a_row():
    """Of keys, scores or anything else: no array of the program has a dim as long as the row, or its chunks stacked."""
    dims = {
        form: {
            int(n) for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", program(form).as_text()) for n in dims.split(",")
        }
        for form in FORMS
    }
    assert {23, 46} <= dims["ring"]
    assert S not in dims["ring"]
    assert S in dims["ulysses"]
    eight_chunks = re.compile(r"f32\[8,2,4,23,8\]")  # keys of all chunks
    assert eight_chunks.search(program("gather").as_text())
    assert not eight_chunks.search(program("ring").as_text())


@pytest.mark.parametrize(("keep", "rings"), [((), 3), (("attention",), 2)], ids=str)
def test_what_remat_keeps_of_the_ring(keep, rings):
    """Kept by the name `attention`, the output and its log-sum-exp spare the backward pass a third ring."""
    mesh = mesh_of(context=2)
    policy = jax.checkpoint_policies.save_only_these_names(*keep)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((2, 16, 4, 8), np.float32, sharding=NamedSharding(mesh, SPLIT))

        def layer(x):
            return attention(x, x, x, segment_ids_BS=None, implementation="xla", context="ring")

        gradient = jax.grad(lambda x: (jax.checkpoint(layer, policy=policy)(x) ** 2).sum())
        assert str(jax.make_jaxpr(gradient)(x)).count("shard_map[") == rings


def test_a_form_lowers_for_tpu_with_its_kernel():
    tpu = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = axes.abstract_mesh({"context": 4, "tensor": 2}, tpu)
    kernels = {}
    with jax.sharding.use_abstract_mesh(mesh):
        q, k = (
            jax.ShapeDtypeStruct((2, 1024, heads, 128), "bfloat16", sharding=NamedSharding(mesh, SPLIT))
            for heads in (16, 8)
        )
        ids = jax.ShapeDtypeStruct((2, 1024), np.int32, sharding=NamedSharding(mesh, P(*SPLIT[:2])))
        for form in FORMS:

            def loss(q, k, v, ids, form=form):
                return attention(q, k, v, segment_ids_BS=ids, context=form).astype("float32").sum()

            traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, ids)
            kernels[form] = traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")
    assert kernels == {"ring": 0, "gather": 0, "ulysses": 3}


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_of_whole_rows_do_not_go_with_divided_ones(kernel):
    mesh = mesh_of(context=2)
    q = jax.device_put(inputs()[0], NamedSharding(mesh, SPLIT))
    with jax.set_mesh(mesh), pytest.raises(UnsupportedAttention, match=r"use model\.context=ulysses, or model\.att"):
        attention(q, q, q, segment_ids_BS=None, implementation=kernel, context="ring")
