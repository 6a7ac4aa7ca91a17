"""Norms, clipping and the moving average, sharded and not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale import axes, tree
from jaxscale.optim.clip import clip_by_global_norm, norm_of, sum_of_squares
from jaxscale.optim.ema import init_ema, update_ema
from jaxscale.task import Parameter

TABLE = {
    "layers/w": Parameter((4, 16, 8), ("layers", "embed", "mlp")),
    "layers/norm": Parameter((4, 16), ("layers", "norm"), init="ones"),
    "head": Parameter((16, 32), ("embed", "vocab")),
}


def draw(dtype=jnp.float32) -> dict:
    keys = jax.random.split(jax.random.key(0), len(TABLE))
    values = {path: jax.random.normal(k, p.shape, dtype) for k, (path, p) in zip(keys, TABLE.items(), strict=True)}
    return tree.unflatten(values)


def shard(values: dict) -> dict:
    return tree.map_paths(lambda path, leaf: jax.device_put(leaf, axes.sharding(TABLE[path].axes)), values)


@pytest.fixture
def mesh():
    with jax.set_mesh(jax.make_mesh((1, 2, 2, 1, 1, 2), axes.AXES)) as mesh:
        yield mesh


def test_sums_by_layer_and_in_all():
    values = draw()
    w = np.asarray(values["layers"]["w"], np.float64)
    by_layer = sum_of_squares(values, TABLE)
    assert by_layer["layers/w"].shape == (4,)
    np.testing.assert_allclose(by_layer["layers/w"], (w**2).sum((1, 2)), rtol=1e-6)
    assert by_layer["head"].shape == ()
    whole = sum_of_squares(values)
    assert {leaf.shape for leaf in whole.values()} == {()}
    expected = float(optax.global_norm(values))
    assert float(norm_of(by_layer)) == pytest.approx(expected, rel=1e-6)
    assert float(norm_of(whole)) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_is_summed_in_float32():
    ones = {"x": jnp.full((4096,), 1.0, jnp.bfloat16)}  # a bfloat16 sum sticks at 256
    assert norm_of(sum_of_squares(ones)).dtype == jnp.float32
    assert float(norm_of(sum_of_squares(ones))) == 64.0


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clip_equals_optax(limit):
    values = draw()
    clipped = clip_by_global_norm(values, norm_of(sum_of_squares(values)), limit)
    expected, _ = optax.clip_by_global_norm(limit).update(values, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)


def test_zero_means_no_clipping():
    values = draw()
    assert clip_by_global_norm(values, jnp.float32(1e9), 0.0) is values


def test_clip_keeps_dtype_and_survives_zero_gradients():
    clipped = clip_by_global_norm(draw(jnp.bfloat16), jnp.float32(10.0), 1.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(clipped)} == {jnp.dtype(jnp.bfloat16)}
    zeros = {"x": jnp.zeros(3)}
    assert not jnp.isnan(clip_by_global_norm(zeros, norm_of(sum_of_squares(zeros)), 1.0)["x"]).any()


def test_sharded_norms_move_only_numbers(mesh):  # noqa: ARG001 - sets the mesh
    values = draw()
    sharded = shard(values)

    def clipped(values):
        return clip_by_global_norm(values, norm_of(sum_of_squares(values)), 0.5), sum_of_squares(values, TABLE)

    compiled = jax.jit(clipped).lower(sharded).compile()
    (got, sums), (expected, expected_sums) = compiled(sharded), clipped(values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (got, sums), (expected, expected_sums))
    assert jax.tree.map(lambda a: a.sharding.spec, got) == jax.tree.map(lambda a: a.sharding.spec, sharded)
    moved = re.findall(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", compiled.as_text())
    assert {name for _, name in moved} == {"all-reduce"}
    assert set(re.findall(r"f32\[[\d,]*\]", " ".join(shapes for shapes, _ in moved))) <= {"f32[]", "f32[4]"}


def test_ema(mesh):  # noqa: ARG001 - sets the mesh
    params = shard(draw(jnp.bfloat16))
    ema = init_ema(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(ema)} == {jnp.dtype(jnp.float32)}
    update = jax.jit(update_ema, static_argnums=2)
    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for i in range(4):
        params = jax.tree.map(lambda p: p * (i + 1), params)  # noqa: B023 - used at once
        ema = update(ema, params, 0.9)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * np.asarray(p, np.float64), expected, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ema, expected)
    assert jax.tree.map(lambda a: a.sharding.spec, ema) == jax.tree.map(lambda a: a.sharding.spec, params)


def test_ema_is_its_own_array():
    params = draw()
    ema = init_ema(params)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(ema))
