"""Attention over the mesh axis `context` in its three forms, against a plain float64 reference of whole rows."""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.ops.attention import attention
from jaxscale.parallel import context

FORMS = ("ring", "gather", "ulysses")
SPLIT = P(axes.BATCH_AXES, "context", "tensor", None)
OPTIONS = [{}, {"window": 7}, {"window": 20, "softcap": 1.5}, {"window": 1}]


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


@pytest.mark.parametrize(
    "sizes", [{"context": 2}, {"context": 3}, {"context": 8}, {"context": 2, "tensor": 2, "fsdp": 2}], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_on_other_meshes(form, sizes):
    heads = {"H": 6, "G": 3} if sizes["context"] == 3 else {"H": 8, "G": 2}  # 8 devices copy the 2 key heads
    arrays = inputs(**heads)
    assert_close(on_mesh(mesh_of(**sizes), form, arrays, window=13), plain(*arrays, window=13))


@pytest.mark.parametrize("form", FORMS)
def test_without_segments(form):
    q, k, v, cotangent, _ = inputs()
    arrays = (q, k, v, cotangent, None)
    assert_close(on_mesh(mesh_of(context=4), form, arrays), plain(*arrays))
