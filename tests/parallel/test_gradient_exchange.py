"""Gradients across slices: what each compression adds up and keeps back, against NumPy on whole arrays.

The arrays are small and have every kind of sharding: layers, a width over `fsdp`, heads over `tensor`, and a norm that
is on every device. A sum counts as equal on all slices only where each device's own copy has the same bits.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes, tree
from jaxscale.config import ConfigError
from jaxscale.parallel.across_config import AcrossConfig
from jaxscale.parallel.compress import Quantised, count, drawn, rounding_noise
from jaxscale.parallel.gradient_exchange import RESIDUAL, RIGHT, exchange, init_across
from jaxscale.parallel.slices import EVERYWHERE, OWN, as_own, on_each_slice, own
from jaxscale.task import Parameter

TABLE = {
    "layers/q": Parameter((2, 8, 4, 12), ("layers", "embed", "heads", "head_dim"), matrix_dims=(1, 2)),
    "embed/table": Parameter((24, 16), ("vocab", "embed")),
    "norm/scale": Parameter((8,), ("norm",), init="ones"),
}
KEY = 7


class Task:
    parameters = TABLE


def mesh_of(**sizes):
    devices = int(np.prod(list(sizes.values())))
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:devices])


def draw(slices, seed=0):
    """A gradient for each slice: path -> (slices, ...)."""
    generator = np.random.default_rng(seed)
    return {
        path: (generator.normal(size=(slices, *p.shape)) * np.exp(generator.normal(size=p.shape))).astype(np.float32)
        for path, p in TABLE.items()
    }


def spec_of(path):
    return axes.spec(*TABLE[path].axes)


def run(across, gradients, steps=1, start=None, **sizes):
    """Sums of each step (path -> array, bits compared between devices), and what the state keeps at the end."""
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        kept = start or init_across(across, Task, jax.random.key(1)).get("across", {})
        kept = {RESIDUAL: {}, RIGHT: {}, **kept}
        given = tree.unflatten({p: jax.device_put(g, jax.P("data", *spec_of(p))) for p, g in gradients.items()})

        def body(g, kept, key):
            mine = {RESIDUAL: own(kept[RESIDUAL]), RIGHT: kept[RIGHT]}
            summed, mine = exchange(across, TABLE, own(g), mine, key)
            return summed, {RESIDUAL: as_own(mine[RESIDUAL]), RIGHT: mine[RIGHT]}

        places = {RESIDUAL: OWN, RIGHT: EVERYWHERE}
        step = jax.jit(on_each_slice(body, (OWN, places, EVERYWHERE), (EVERYWHERE, places)))
        sums = []
        for number in range(steps):
            summed, kept = step(given, kept, jax.random.fold_in(jax.random.key(KEY), number))
            sums.append({path: whole(leaf) for path, leaf in tree.flatten(summed).items()})
    return sums, jax.tree.map(np.asarray, kept)


def whole(leaf):
    """The array, once every device that has a part of it has the same bits of it."""
    by_place = {}
    for shard in leaf.addressable_shards:
        by_place.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    for copies in by_place.values():
        assert len(copies) > 1
        assert all(copy.tobytes() == copies[0].tobytes() for copy in copies)
    return np.asarray(leaf)


def assert_close(got, wanted, relative):
    for path in TABLE:
        assert np.linalg.norm(got[path] - wanted[path]) <= relative * np.linalg.norm(wanted[path]), path


INSIDE = {"fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("slices", [2, 4])
def test_float32_is_the_sum(slices):
    gradients = draw(slices)
    inside = INSIDE if slices == 2 else {"fsdp": 2}
    (summed,), _ = run(AcrossConfig("float32"), gradients, data=slices, **inside)
    assert_close(summed, {path: g.sum(0) for path, g in gradients.items()}, 1e-6)


@pytest.mark.parametrize(("kind", "relative"), [("bfloat16", 3e-3), ("int8", 2e-2)])
@pytest.mark.parametrize("slices", [2, 4])
def test_fewer_bits(kind, relative, slices):
    """Close to the sum, norms exactly it; different places of one number's copies would be seen in `whole`."""
    gradients = draw(slices)
    inside = INSIDE if slices == 2 else {"fsdp": 2}
    (summed,), _ = run(AcrossConfig(kind, block=16), gradients, data=slices, **inside)
    wanted = {path: g.sum(0) for path, g in gradients.items()}
    assert_close(summed, wanted, relative)
    np.testing.assert_allclose(summed["norm/scale"], wanted["norm/scale"], rtol=1e-6)
    assert not np.array_equal(summed["layers/q"], wanted["layers/q"])


def test_bfloat16_of_two_slices_is_the_sum_of_rounded_ones():
    gradients = draw(2)
    (summed,), _ = run(AcrossConfig("bfloat16"), gradients, data=2)
    for path in ("layers/q", "embed/table"):
        rounded = gradients[path].astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(summed[path], rounded[0] + rounded[1])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_numbers(bits):
    """Each number comes out as one of its two neighbours on the block's grid, and on average as itself."""
    codec = Quantised(bits, 8)
    x = np.random.default_rng(0).normal(size=64).astype(np.float32) * np.repeat([1e-6, 1, 1e3, 0], 16)
    x = x.astype(np.float32)
    noise = np.random.default_rng(1).random((4000, 64), np.float32)
    message = jax.vmap(codec.encode, (None, 0))(x, noise)
    assert message.dtype == jnp.int8
    assert message.shape[1] == 64 * bits // 8 + 4 * 8
    decoded = np.asarray(jax.vmap(codec.decode)(message))
    step = np.repeat(np.abs(x.reshape(-1, 8)).max(1), 8) / (2 ** (bits - 1) - 1)
    assert np.all(np.abs(decoded - x) <= step * 1.0001)
    assert np.all(np.abs(decoded.mean(0) - x) <= 0.04 * step + 1e-12)
    assert np.all(decoded[:, 48:] == 0)


def test_rounding_comes_from_the_step_the_path_and_the_slice():
    gradients = {path: np.repeat(g[:1], 2, 0) for path, g in draw(2).items()}  # alike on both slices
    across = AcrossConfig("int8", block=16)
    sums, _ = run(across, gradients, steps=2, data=2, fsdp=2)
    assert not np.array_equal(sums[0]["layers/q"], sums[1]["layers/q"])
    again, _ = run(across, gradients, data=2, fsdp=2)
    np.testing.assert_array_equal(sums[0]["layers/q"], again[0]["layers/q"])
    by_slice = []
    for s in range(2):
        alone = {path: g * (np.arange(2) == s).reshape(2, *[1] * (g.ndim - 1)) for path, g in gradients.items()}
        (one,), _ = run(across, {path: g.astype(np.float32) for path, g in alone.items()}, data=2, fsdp=2)
        by_slice.append(one["layers/q"])
    assert not np.array_equal(*by_slice)
    np.testing.assert_allclose(sum(by_slice), sums[0]["layers/q"], rtol=1e-5, atol=1e-6)


def test_noise_is_uniform_and_the_same_on_every_mesh():
    found = []
    for sizes in ({"fsdp": 4, "tensor": 2}, {"data": 2}):
        with jax.set_mesh(mesh_of(**sizes)):
            draw_it = jax.jit(lambda key: rounding_noise(key, (256, 64), jax.P("fsdp", "tensor")))
            found.append(np.stack([draw_it(jax.random.key(seed)) for seed in range(20)]))
    np.testing.assert_array_equal(*found)
    values = found[0].reshape(20, -1)
    counts = np.histogram(values, 64, (0, 1))[0]
    assert np.sum((counts - counts.mean()) ** 2 / counts.mean()) < 63 + 4 * np.sqrt(2 * 63)
    between_seeds = np.corrcoef(values)[np.triu_indices(20, 1)]
    assert np.abs(between_seeds).max() < 5 / np.sqrt(values.shape[1])
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(values.size)


def sparse_reference(gradients, share, steps, blocks):
    """Top-k with error feedback in NumPy; `blocks(path, array)` gives views (L, N) of the parts that devices hold."""
    slices = len(gradients["norm/scale"])
    residual = {path: np.zeros_like(g) for path, g in gradients.items()}
    sums = []
    for _ in range(steps):
        total = {path: np.zeros(g.shape[1:], np.float32) for path, g in gradients.items()}
        for path, g in gradients.items():
            if path == "norm/scale":
                total[path] = g.sum(0)
                continue
            for s in range(slices):
                wanted = residual[path][s] + g[s]
                sent = np.zeros_like(wanted)
                for index in blocks(path):
                    part = wanted[index]
                    rows = part.reshape(part.shape[0] if path == "layers/q" else 1, -1)
                    out = np.zeros_like(rows)
                    for layer, row in enumerate(rows):
                        k = max(1, round(share * row.size))
                        places = np.argsort(-np.abs(row), kind="stable")[:k]
                        out[layer, places] = row[places]
                    sent[index] = out.reshape(part.shape)
                residual[path][s] = wanted - sent
                total[path] = total[path] + sent
        sums.append(total)
    return sums, residual


def parts(path):
    """What the four devices of a slice hold of a weight on fsdp 2 x tensor 2."""
    halves = {"embed": 8 if path == "embed/table" else 4, "heads": 2, "vocab": 12}
    cuts = [
        [slice(i * halves[name], (i + 1) * halves[name]) for i in range(2)] if name in halves else [slice(None)]
        for name in TABLE[path].axes
    ]
    return list(itertools.product(*cuts))


def test_top_k_with_error_feedback():
    gradients = draw(2)
    sums, kept = run(AcrossConfig("top-k", share=0.1), gradients, steps=3, data=2, **INSIDE)
    wanted, residual = sparse_reference(gradients, 0.1, 3, parts)
    for got, want in zip(sums, wanted, strict=True):
        for path in TABLE:
            np.testing.assert_allclose(got[path], want[path], rtol=1e-6, atol=1e-7, err_msg=path)
            if path != "norm/scale":
                assert 0.08 < np.mean(got[path] != 0) < 0.25
    for path, left in tree.flatten(kept[RESIDUAL]).items():
        np.testing.assert_allclose(left, residual[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("kind", ["top-k", "random-k", "power-sgd"])
def test_nothing_is_lost(kind):
    """What was sent in all steps, and what is left on the slices, is all that there was to send."""
    gradients, steps = draw(2), 4
    sums, kept = run(AcrossConfig(kind, share=0.1, rank=2), gradients, steps=steps, data=2, **INSIDE)
    left = {path: leaf.sum(0) for path, leaf in tree.flatten(kept[RESIDUAL]).items()}
    assert left.keys() == TABLE.keys() - {"norm/scale"}
    for path, g in gradients.items():
        sent = sum(one[path] for one in sums)
        np.testing.assert_allclose(sent + left.get(path, 0), steps * g.sum(0), rtol=1e-4, atol=1e-4, err_msg=path)
        if path in left:
            assert np.linalg.norm(left[path]) > 0.1 * np.linalg.norm(g), path


def test_random_places_reach_every_number():
    seen = np.zeros(103, int)
    for seed in range(400):
        places = np.asarray(drawn(jax.random.key(seed), 103, 0.1))
        assert len(set(places.tolist())) == len(places)
        np.add.at(seen, places[places < 103], 1)
    assert seen.min() > 15
    assert seen.max() < 75
    assert count(103, 0.1) == 10
    assert count(3, 0.01) == 1


def test_power_sgd_step_is_a_power_iteration():
    """Against NumPy on the whole matrices, warm start and residuals included."""
    gradients, steps, rank = draw(2), 3, 2
    across = AcrossConfig("power-sgd", rank=rank)
    with jax.set_mesh(mesh_of(data=2)):
        start = init_across(across, Task, jax.random.key(1))["across"]
        right = {path: np.asarray(leaf) for path, leaf in tree.flatten(start[RIGHT]).items()}
    sums, _ = run(across, gradients, steps=steps, data=2, **INSIDE)
    shapes = {"layers/q": (2, 8, 48), "embed/table": (1, 24, 16)}
    for path, shape in shapes.items():
        m = gradients[path].reshape(2, *shape)
        q = right[path].reshape(shape[0], shape[2], rank).copy()
        error = np.zeros_like(m)
        for number in range(steps):
            wanted, total = m + error, np.zeros(shape)
            for layer in range(shape[0]):
                p = sum(wanted[s, layer] @ q[layer] for s in range(2))
                p, _ = np.linalg.qr(p)
                own_q = [wanted[s, layer].T @ p for s in range(2)]
                for s in range(2):
                    error[s, layer] = wanted[s, layer] - p @ own_q[s].T
                q[layer] = own_q[0] + own_q[1]
                total[layer] = p @ q[layer].T
            np.testing.assert_allclose(
                sums[number][path].reshape(shape), total, rtol=1e-3, atol=2e-3 * np.abs(total).max(), err_msg=path
            )


def test_power_sgd_finds_what_has_that_rank():
    generator = np.random.default_rng(3)
    gradients = draw(2)
    low = generator.normal(size=(2, 24, 2)) @ generator.normal(size=(2, 2, 16))
    gradients["embed/table"] = low.astype(np.float32)
    sums, _ = run(AcrossConfig("power-sgd", rank=4), gradients, data=2)
    np.testing.assert_allclose(sums[0]["embed/table"], low.sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "top-k", "random-k", "power-sgd"])
def test_what_is_not_finite_on_one_slice_is_seen_by_all(kind):
    gradients = draw(2)
    gradients["layers/q"][1, 0, 3, 2, 5] = np.inf
    (summed,), _ = run(AcrossConfig(kind, block=16), gradients, data=2, fsdp=2)
    assert all(np.isnan(value).all() for value in summed.values())


def test_one_slice_that_is_left_sends_all():
    """A world that shrinks to one slice goes on: nothing crosses any link, so nothing is left out."""
    gradients = draw(1)
    (summed,), kept = run(AcrossConfig("top-k", share=0.1), gradients, data=1, expert=2)
    for path in TABLE:
        np.testing.assert_allclose(summed[path], gradients[path][0], rtol=1e-6)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(kept[RESIDUAL]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share": 1.5}, "across.share is 1.5"),
        ({"share": 0.0}, "above 0"),
        ({"rank": 0}, "across.rank is 0"),
        ({"block": 4}, "across.block is 4"),
        ({"warmup": -1}, "across.warmup is -1"),
    ],
)
def test_what_cannot_work_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(AcrossConfig("top-k"), **changes)


@pytest.mark.parametrize(
    ("kind", "slices", "noise", "chunks", "said"),
    [
        ("int8", 1, False, 1, "mesh.data is 1"),
        ("bfloat16", 2, True, 1, "train.noise-scale"),
        ("top-k", 2, False, 2, "pipeline.chunks to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(kind, slices, noise, chunks, said):
    with pytest.raises(ConfigError, match=said):
        AcrossConfig(kind).check(slices, noise, chunks, fresh=True)
    AcrossConfig("direct").check(slices, noise, chunks, fresh=True)
    AcrossConfig("int8").check(1, False, 1, fresh=False)  # the other slice was lost
