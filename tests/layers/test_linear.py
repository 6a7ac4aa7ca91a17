"""Projections, embedding and reductions: values and gradients against plain einsum, on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxscale import axes
from jaxscale.layers.embed import embed
from jaxscale.layers.linear import column, project, row
from jaxscale.layers.reduce import contract, result_axes
from jaxscale.precision import Precision

SINGLE = Precision(jnp.float32, jnp.float32, jnp.float32)
MIXED = Precision(jnp.float32, jnp.bfloat16, jnp.float32)
ALL_LOW = Precision(jnp.float32, jnp.bfloat16, jnp.bfloat16)
MESHES = [{}, {"fsdp": 8}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 2, "tensor": 2, "expert": 2}]
B, S, D, H, G, K, F, V = 8, 16, 16, 4, 4, 8, 32, 24


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values()))) if sizes else 1
    return jax.make_mesh(tuple(sizes.get(a, 1) for a in axes.AXES), axes.AXES, devices=jax.devices()[:count])


def draw(seed, shape, *names):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jax.device_put(values, axes.sharding(names))


def block(precision):
    """Two projections of one input and one back: a gated MLP without its nonlinearity, and its plain form."""
    hidden = axes.spec("act_batch", "act_sequence", "act_mlp")
    inward, outward = (
        column("BSD,DF->BSF", ("embed", "mlp"), y=hidden),
        row("BSF,FD->BSD", ("mlp", "embed"), x=hidden),
    )

    def sharded(x, gate, up, down):
        a, b = project((inward, inward), precision, x, (gate, up))
        (y,) = project((outward,), precision, a * b, (down,))
        return y

    return sharded


def plain(x, gate, up, down):
    return ((x @ gate) * (x @ up)) @ down


def operands():
    x = draw(0, (B, S, D), "act_batch", "act_residual_sequence", "act_embed")
    return x, draw(1, (D, F), "embed", "mlp"), draw(2, (D, F), "embed", "mlp"), draw(3, (F, D), "mlp", "embed")


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_gradients_and_shardings(sizes):
    with jax.set_mesh(mesh_of(sizes)):
        args = operands()
        weight = draw(4, (B, S, D), "act_batch", "act_residual_sequence", "act_embed")
        y, transpose = jax.vjp(jax.jit(block(SINGLE)), *args)
        gradients = transpose(weight)
        host = [np.asarray(a) for a in args]
        expected, plain_transpose = jax.vjp(plain, *map(jnp.asarray, host))
        assert jax.typeof(y).sharding.spec == jax.typeof(args[0]).sharding.spec
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-4)
        for got, want, arg in zip(gradients, plain_transpose(jnp.asarray(np.asarray(weight))), args, strict=True):
            assert got.sharding.is_equivalent_to(arg.sharding, got.ndim)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-3)


def attention_block(x, q, k, v, o):
    """The projections around attention, whose weights have three dims."""
    queries, keys = (axes.spec("act_batch", "act_sequence", name, None) for name in ("act_heads", "act_kv_heads"))
    query = column("BSD,DHK->BSHK", ("embed", "heads", "head_dim"), y=queries)
    key = column("BSD,DGK->BSGK", ("embed", "kv_heads", "head_dim"), y=keys)
    out = row("BSHK,HKD->BSD", ("heads", "head_dim", "embed"), x=queries)
    q, k, v = project((query, key, key), SINGLE, x, (q, k, v))
    (y,) = project((out,), SINGLE, q * jnp.tanh(k) + v, (o,))
    return y


def plain_attention_block(x, q, k, v, o):
    q, k, v = (jnp.einsum("BSD,DHK->BSHK", x, w) for w in (q, k, v))
    return jnp.einsum("BSHK,HKD->BSD", q * jnp.tanh(k) + v, o)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_projections_of_attention(sizes):
    with jax.set_mesh(mesh_of(sizes)):
        x = draw(0, (B, S, D), "act_batch", "act_residual_sequence", "act_embed")
        q = draw(1, (D, H, K), "embed", "heads", "head_dim")
        k, v = (draw(seed, (D, G, K), "embed", "kv_heads", "head_dim") for seed in (2, 3))
        args = (x, q, k, v, draw(4, (H, K, D), "heads", "head_dim", "embed"))
        weight = draw(5, (B, S, D), "act_batch", "act_residual_sequence", "act_embed")
        y, transpose = jax.vjp(jax.jit(attention_block), *args)
        gradients = transpose(weight)
        expected, plain_transpose = jax.vjp(plain_attention_block, *(jnp.asarray(np.asarray(a)) for a in args))
        assert jax.typeof(y).sharding.spec == jax.typeof(x).sharding.spec
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-4)
        for got, want, arg in zip(gradients, plain_transpose(jnp.asarray(np.asarray(weight))), args, strict=True):
            assert got.sharding.is_equivalent_to(arg.sharding, got.ndim)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_check_grads(sizes):
    with jax.set_mesh(mesh_of(sizes)):
        small = [a * 0.3 for a in operands()]
        check_grads(jax.jit(block(SINGLE)), small, order=1, modes=["rev"], rtol=1e-2, atol=1e-2)
        tokens = jax.device_put(np.arange(B * S, dtype=np.int32).reshape(B, S) % V, axes.sharding(("act_batch", None)))
        tokens = jax.reshard(tokens, axes.spec("act_batch", "act_sequence"))
        table = draw(5, (V, D), "vocab", "embed")
        check_grads(lambda t: embed(SINGLE, t, tokens) ** 2, (table,), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_embedding(sizes):
    with jax.set_mesh(mesh_of(sizes)):
        host = np.random.default_rng(6).integers(0, V, (B, S)).astype(np.int32)
        tokens = jax.device_put(host, axes.sharding(("act_batch", "act_sequence")))
        table = draw(5, (V, D), "vocab", "embed")
        weight = draw(7, (B, S, D), "act_batch", "act_residual_sequence", "act_embed")
        x, transpose = jax.vjp(jax.jit(lambda t: embed(SINGLE, t, tokens)), table)
        np.testing.assert_array_equal(x, np.asarray(table)[host])
        (gradient,) = transpose(weight)
        expected = np.zeros((V, D))
        np.add.at(expected, host, np.asarray(weight, np.float64))
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
        assert gradient.sharding.is_equivalent_to(table.sharding, 2)


def weight_gradient_error(precision):
    """Relative error of a weight's gradient that many rows with one sign add up to."""
    with jax.set_mesh(mesh_of({"data": 8})):
        rows = axes.spec("act_batch", "act_sequence", "act_embed")
        x = jax.device_put(np.random.default_rng(0).uniform(0.5, 1.5, (64, 64, D)), axes.sharding(("act_batch",)))
        x = jax.reshard(x.astype(jnp.bfloat16), rows)
        w = draw(1, (D, F), "embed", "mlp")
        p = column("BSD,DF->BSF", ("embed", "mlp"), y=axes.spec("act_batch", "act_sequence", "act_mlp"))
        gradient = jax.jit(jax.grad(lambda w: project((p,), precision, x, (w,))[0].astype(jnp.float32).sum()))(w)
        exact = np.asarray(x, np.float64).sum((0, 1))[:, None]
        return np.abs(np.asarray(gradient, np.float64) / exact - 1).max()


def test_gradients_are_reduced_in_the_reduce_dtype():
    assert weight_gradient_error(MIXED) < 1e-5
    assert weight_gradient_error(ALL_LOW) > 1e-4  # bfloat16 keeps 8 bits; this shows that the option is obeyed


def test_frequent_tokens_keep_their_gradient():
    """4,096 gradients of 1 in one row of the table: bfloat16 would stop counting at 256."""
    with jax.set_mesh(mesh_of({"fsdp": 8})):
        tokens = jax.device_put(np.zeros((64, 64), np.int32), axes.sharding(("act_batch", "act_sequence")))
        table = draw(5, (V, D), "vocab", "embed")
        gradient = jax.grad(lambda t: embed(MIXED, t, tokens).astype(jnp.float32).sum())(table)
        np.testing.assert_array_equal(np.asarray(gradient)[0], np.full(D, 4096.0))


def test_result_axes():
    local, contracted = result_axes("BSD,DF->BSF", jax.P(("data", "fsdp"), None, "tensor"), jax.P("tensor", None))
    assert local == [("data", "fsdp"), (), ()]
    assert contracted == {"tensor"}


def test_parts_are_added_before_they_are_reduced():
    """Two products, one collective: that is what makes the input's gradient of q, k and v cheap."""
    with jax.set_mesh(mesh_of({"tensor": 4})):
        y = draw(0, (B, S, F), "act_batch", "act_sequence", "act_mlp")
        w = draw(1, (D, F), None, "mlp")
        out = axes.spec("act_batch", "act_residual_sequence", "act_embed")

        def both(y, w):
            return contract([("BSF,DF->BSD", y, w), ("BSF,DF->BSD", y * 2, w)], out, jnp.float32)

        text = jax.jit(both).lower(y, w).as_text()
        assert text.count("stablehlo.reduce_scatter") == 1
        np.testing.assert_allclose(both(y, w), 3 * np.asarray(y) @ np.asarray(w).T, rtol=1e-4, atol=1e-3)
