"""The layer of experts against a plain one in NumPy, and what its routing, its losses and its limits promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_experts import plain_moe

from jaxscale import axes
from jaxscale.config import ConfigError
from jaxscale.layers.moe import Tokens, moe, moe_parameters
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.parallel.expert import row_capacity
from jaxscale.precision import Precision

B, S, D, F, LAYERS = 4, 16, 8, 12, 2
BASE = ExpertsConfig(count=8, balance_loss=0.1, z_loss=0.01, bias_step=1e-3)
VARIANTS = {
    "softmax": BASE,
    "sigmoid": dataclasses.replace(BASE, score="sigmoid", scale=2.5),
    "one of them": dataclasses.replace(BASE, top_k=1, normalise=False),
    "all of them": dataclasses.replace(BASE, count=4, top_k=4),
    "shared": dataclasses.replace(BASE, shared=2),
    "ragged": dataclasses.replace(BASE, dispatch="ragged"),
    "little room": dataclasses.replace(BASE, capacity=0.5),
    "enough room": dataclasses.replace(BASE, capacity=8.0),
}
FLOAT32 = Precision(jnp.float32, jnp.float32, jnp.float32)


def draw(config):
    generator = np.random.default_rng(0)
    table = moe_parameters(D, F, LAYERS, config)
    weights = {
        block: {name: generator.normal(size=p.shape, scale=max(p.scale, 0.3)) for name, p in parameters.items()}
        for block, parameters in table.items()
    }
    real = np.ones((B, S), bool)
    real[1, 10:], real[3] = False, False
    weight = real * (generator.random((B, S)) < 0.8)
    return generator.normal(size=(B, S, D)), weights, real, weight.astype(np.float64)


def put(value, *names):
    return jax.device_put(np.asarray(value, np.float32), axes.sharding(names))


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values()), dtype=int))
    return jax.make_mesh(tuple(sizes.get(a, 1) for a in axes.AXES), axes.AXES, devices=jax.devices()[:count])


def run(config, x, weights, real, weight, sizes=None):
    table = moe_parameters(D, F, LAYERS, config)
    with jax.set_mesh(mesh_of(sizes or {})):
        given = {
            block: {name: put(value, *table[block][name].axes) for name, value in own.items()}
            for block, own in weights.items()
        }
        tokens = ("act_batch", "act_residual_sequence")
        of_tokens = Tokens(jax.device_put(real, axes.sharding(tokens)), put(weight, *tokens))

        def loss(weights, x):
            y, sums = moe(x, weights, config, FLOAT32, of_tokens, LAYERS)
            return sums.loss, (y, sums.metrics)

        gradients, (y, metrics) = jax.jit(jax.grad(loss, has_aux=True))(given, put(x, *tokens, None))
        return np.asarray(y), jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layer_is_that_of_a_plain_implementation(name):
    config = VARIANTS[name]
    x, weights, real, weight = draw(config)
    capacity = row_capacity(config.capacity, S, config.top_k, config.count)
    right, sums = plain_moe(x, weights, config, real, weight, capacity)
    y, metrics, gradients = run(config, x, weights, real, weight)
    np.testing.assert_allclose(y, right, atol=2e-5)
    np.testing.assert_array_equal(metrics["layers/load"], sums["load"])
    np.testing.assert_allclose(metrics["balance_loss"], 0.1 * sums["balance"], rtol=1e-5)
    np.testing.assert_allclose(metrics["router_z_loss"], 0.01 * sums["z"], rtol=1e-5)
    # The bias follows the load: its gradient is the load's error, and nothing else moves it.
    np.testing.assert_allclose(gradients["router"]["bias"], sums["load"] - sums["load"].mean(), atol=1e-5)
    assert ("dropped" in metrics) == (config.capacity is not None)
    if config.capacity is not None:
        assert metrics["layers/dropped"] == sums["dropped"]
        assert metrics["dropped"] == pytest.approx(sums["dropped"] / (config.top_k * LAYERS))
        assert (sums["dropped"] > 0) == (name == "little room")


def test_a_limit_of_a_row_is_the_same_on_every_mesh():
    """Which tokens find room depends on the row's tokens before them, also where devices have parts of the row."""
    config = VARIANTS["little room"]
    given = draw(config)
    alone = run(config, *given)
    split = run(config, *given, {"expert": 2, "context": 2, "tensor": 2})
    np.testing.assert_allclose(split[0], alone[0], atol=1e-5)
    for name in ("layers/load", "layers/dropped"):
        np.testing.assert_array_equal(split[1][name], alone[1][name])


def test_later_tokens_take_no_room_from_earlier_ones():
    config = VARIANTS["little room"]
    x, weights, real, weight = draw(config)
    changed = x.copy()
    changed[:, S // 2 :] = -x[:, : S // 2]
    before, after = (run(config, value, weights, real, weight)[0] for value in (x, changed))
    np.testing.assert_array_equal(before[:, : S // 2], after[:, : S // 2])
    assert not np.allclose(before[:, S // 2 :], after[:, S // 2 :])


def test_padding_counts_for_nothing():
    config = VARIANTS["little room"]
    x, weights, real, weight = draw(config)
    other = np.where(real[..., None], x, 100.0)
    first, second = (run(config, value, weights, real, weight) for value in (x, other))
    np.testing.assert_array_equal(np.where(real[..., None], first[0], 0), np.where(real[..., None], second[0], 0))
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])
    np.testing.assert_array_equal(second[0][~real], 0)


def test_ties_go_to_the_lower_number():
    config = dataclasses.replace(BASE, bias_step=0.0)
    x, weights, real, weight = draw(config)
    weights["router"]["weight"][:] = 0
    metrics = run(config, x, weights, real, weight)[1]
    np.testing.assert_array_equal(metrics["layers/load"], [weight.sum()] * 2 + [0] * 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, r"top-k \(9\) is more than there are experts \(model.experts.count 8\); use 8 or less"),
        ({"top_k": 0}, "top-k is 0; a token goes to 1 expert or more"),
        ({"top_k": 1}, "the router would learn nothing"),
        ({"capacity": 0.0}, "capacity is 0.0: no expert would take a token"),
        ({"capacity": -1.0}, "capacity is -1.0"),
        ({"capacity": 1.0, "dispatch": "ragged"}, "ragged, which has no capacity to fill"),
        ({"shared": -1}, "shared is -1; use 0"),
        ({"count": -1}, "count is -1"),
        ({"hidden": -2}, "hidden is -2"),
        ({"balance_loss": -0.1}, "balance-loss is -0.1"),
        ({"z_loss": -0.1}, "z-loss is -0.1"),
        ({"bias_step": -0.1}, "bias-step is -0.1"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **change)


def test_room_is_rounded_up_and_never_more_than_a_row():
    assert row_capacity(1.0, 10, 2, 8) == 3
    assert row_capacity(1.25, 64, 2, 8) == 20
    assert row_capacity(100.0, 64, 2, 8) == 64
    assert row_capacity(None, 64, 2, 8) is None
