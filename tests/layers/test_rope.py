"""Rotary embeddings against independent numpy formulas of the papers, and their defining properties."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from jaxscale import axes
from jaxscale.config import ConfigError
from jaxscale.layers.rope import attention_factor, frequencies, rope_tables, rotate
from jaxscale.models.rope_config import RopeConfig

LLAMA31 = RopeConfig(theta=500000.0, scaling="llama3", factor=8.0)
YARN = RopeConfig(theta=10000.0, scaling="yarn", factor=16.0, original_length=4096)


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((1, 2, 1, 1, 2, 2), axes.AXES, axis_types=(AxisType.Explicit,) * 6)
    with jax.set_mesh(mesh):
        yield mesh


def single_device():
    return jax.set_mesh(
        jax.make_mesh((1,) * 6, axes.AXES, axis_types=(AxisType.Explicit,) * 6, devices=jax.devices()[:1])
    )


def apply_rope(x, positions, config):
    return rotate(x, rope_tables(positions, x.shape[-1], config))


def complex_rotation(x, positions, config):
    """Su et al. 2021, equation 12: each pair is a complex number, turned by e^(i m theta_f). Float64."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angle = np.asarray(positions, np.float64)[..., None] * np.asarray(frequencies(config, x.shape[-1]), np.float64)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1) * attention_factor(config)


@pytest.mark.parametrize("config", [RopeConfig(), LLAMA31, YARN, RopeConfig(scaling="linear", factor=4.0)], ids=str)
def test_equals_complex_rotation(config):
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 7, 3, 16), np.float32), rng.integers(0, 100, (2, 7)).astype(np.int32)
    with single_device():
        out = apply_rope(jnp.asarray(x), jnp.asarray(positions), config)
    np.testing.assert_allclose(out, complex_rotation(x, positions, config), atol=2e-5)


def test_plain_frequencies():
    np.testing.assert_allclose(frequencies(RopeConfig(), 8), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert frequencies(RopeConfig(), 8).dtype == np.float32


def test_linear_divides_every_frequency():
    scaled = frequencies(RopeConfig(scaling="linear", factor=4.0), 64)
    np.testing.assert_allclose(scaled, frequencies(RopeConfig(), 64) / 4, rtol=1e-6)


def test_ntk_keeps_the_highest_and_divides_the_lowest():
    plain, scaled = frequencies(RopeConfig(), 64), frequencies(RopeConfig(scaling="ntk", factor=4.0), 64)
    np.testing.assert_allclose(scaled[0], plain[0])
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-6)
    assert np.all(np.diff(plain / scaled) > 0)


def test_llama3_bands():
    """Llama 3.1: short wavelengths kept, long ones divided, interpolated between by their number of turns."""
    plain, scaled = (frequencies(c, 128).astype(np.float64) for c in (RopeConfig(theta=500000.0), LLAMA31))
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            expected = before
        elif wavelength > 8192 / 1:
            expected = before / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * before / 8 + smooth * before
        assert after == pytest.approx(expected, rel=1e-5)
    kept, divided = np.isclose(scaled, plain), np.isclose(scaled, plain / 8)
    assert kept.any()
    assert divided.any()
    assert not np.all(kept | divided)


def test_yarn_bands():
    """Peng et al. 2023, section 3.2: many turns over the original length kept, less than one divided."""
    plain, scaled = (frequencies(c, 128).astype(np.float64) for c in (RopeConfig(), YARN))
    turns = 4096 * plain / (2 * math.pi)
    fast = 128 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10000.0))
    slow = 128 * math.log(4096 / (1 * 2 * math.pi)) / (2 * math.log(10000.0))
    assert np.allclose(turns[[math.floor(fast), math.ceil(fast)]], 32, rtol=0.2)
    for index, (before, after) in enumerate(zip(plain, scaled, strict=True)):
        ramp = min(max((index - math.floor(fast)) / (math.ceil(slow) - math.floor(fast)), 0), 1)
        assert after == pytest.approx(before * (1 - ramp) + before / 16 * ramp, rel=1e-5)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 0.9], plain[turns < 0.9] / 16, rtol=1e-6)
    assert attention_factor(YARN) == pytest.approx(0.1 * math.log(16) + 1)


@pytest.mark.parametrize("scaling", ["linear", "ntk", "llama3", "yarn"])
def test_factor_one_changes_nothing(scaling):
    config = RopeConfig(scaling=scaling)
    np.testing.assert_array_equal(frequencies(config, 64), frequencies(RopeConfig(), 64))
    assert attention_factor(config) == 1.0


def test_scores_depend_on_relative_positions_only():
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((1, 1, 1, 32), np.float32) for _ in range(2))

    def score(query_position, key_position):
        with single_device():
            turn = lambda x, at: np.asarray(apply_rope(jnp.asarray(x), jnp.array([[at]]), RopeConfig()), np.float64)  # noqa: E731 - one-line helper
            return float((turn(q, query_position) * turn(k, key_position)).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert abs(score(3, 1) - score(4, 1)) > 1e-2


def test_position_zero_is_the_identity_and_norms_are_kept():
    x = np.random.default_rng(2).standard_normal((1, 5, 2, 8), np.float32)
    with single_device():
        still = apply_rope(jnp.asarray(x), jnp.zeros((1, 5), jnp.int32), RopeConfig())
        moved = apply_rope(jnp.asarray(x), jnp.arange(5)[None] * 11, RopeConfig())
    np.testing.assert_array_equal(still, x)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


def test_sharding_and_dtype_are_kept(mesh):
    """Positions come sharded over context; queries hold whole rows and are sharded over heads."""
    x = np.random.default_rng(3).standard_normal((2, 6, 4, 8), np.float32)
    positions = np.arange(12, dtype=np.int32).reshape(2, 6)
    x_sharded = jax.device_put(x, NamedSharding(mesh, axes.spec("act_batch", None, "act_heads", None)))
    positions_sharded = jax.device_put(positions, NamedSharding(mesh, axes.spec("act_batch", "act_sequence")))

    def loss(x, positions):
        out = rotate(x, rope_tables(positions, 8, RopeConfig()))
        assert jax.typeof(out).sharding.spec == jax.typeof(x).sharding.spec
        return (out * out[::-1]).sum(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(x_sharded, positions_sharded)
    np.testing.assert_allclose(out, complex_rotation(x, positions, RopeConfig()), atol=1e-5)
    assert gradient.sharding.is_equivalent_to(x_sharded.sharding, 4)
    assert apply_rope(x_sharded.astype(jnp.bfloat16), positions_sharded, RopeConfig()).dtype == jnp.bfloat16


def test_bfloat16_is_rotated_in_float32():
    x = np.ones((1, 1, 1, 2), np.float32)
    with single_device():
        out = apply_rope(jnp.asarray(x, jnp.bfloat16), jnp.array([[1001]]), RopeConfig())
    expected = jnp.asarray(complex_rotation(x, [[1001]], RopeConfig()), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.5, "scaling": "linear"}, "rope.factor is 0.5"),
        ({"factor": 2.0}, "rope.scaling is none"),
        ({"theta": 0.0}, "rope.theta is 0.0"),
        ({"original_length": 0}, "rope.original-length is 0"),
        ({"low_frequency_factor": 4.0}, "must be positive and below"),
        ({"beta_slow": 33.0}, "rope.beta-slow"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**options)


def test_refuses_odd_head_dim():
    with pytest.raises(ConfigError, match="head dim of 7"):
        frequencies(RopeConfig(), 7)
