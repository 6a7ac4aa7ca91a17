"""Learning-rate scaling and the gradient-noise scale on gradients whose noise is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.optim.scaling import noise_scale, scale_learning_rate, scaling_rule, useful_batch


def test_scaling_rules():
    assert scale_learning_rate(0.1, 256, 64, "linear") == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 256, 64, "sqrt") == pytest.approx(0.2)
    assert scale_learning_rate(0.1, 64, 256, "sqrt") == pytest.approx(0.05)
    assert scaling_rule("sgd") == "linear"
    assert {scaling_rule(name) for name in ("adamw", "muon", "adafactor")} == {"sqrt"}


def test_bad_scaling_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        scale_learning_rate(0.1, 0, 64, "linear")
    with pytest.raises(ValueError, match="cubic"):
        scale_learning_rate(0.1, 1, 64, "cubic")
    with pytest.raises(ValueError, match="small_batch is 8"):
        noise_scale(1.0, 1.0, 8, 8)


def test_exact_expectations_give_the_exact_scale():
    # E|G_B|^2 = |G|^2 + tr(S) / B (appendix A.1).
    signal, trace = 3.0, 96.0
    found = jax.jit(lambda s, b: noise_scale(s, b, 4, 32))(signal + trace / 4, signal + trace / 32)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"signal": signal, "noise_trace": trace, "noise_scale": 32.0}, rel=1e-5
    )


def test_synthetic_gradients():
    rng = np.random.default_rng(0)
    size, microbatches, per = 200, 4, 8
    truth = rng.normal(size=size)
    truth *= 2.0 / np.linalg.norm(truth)  # |G|^2 = 4
    deviations = rng.uniform(0.5, 1.5, size)
    trace = float(np.sum(deviations**2))
    estimates = []
    for _ in range(400):
        examples = truth + deviations * rng.normal(size=(microbatches, per, size))
        small = examples.mean(1)
        big = small.mean(0)
        found = noise_scale(np.mean(np.sum(small**2, 1)), np.sum(big**2), per, microbatches * per)
        estimates.append((float(found["noise_trace"]), float(found["signal"])))
    mean_trace, mean_signal = np.mean(estimates, 0)
    assert mean_trace == pytest.approx(trace, rel=0.02)
    assert mean_signal == pytest.approx(4.0, rel=0.05)
    assert float(useful_batch(mean_trace, mean_signal)) == pytest.approx(trace / 4.0, rel=0.06)


def test_lost_signal_is_nan_not_a_batch():
    assert jnp.isnan(useful_batch(1.0, -0.1))
    assert jnp.isnan(useful_batch(1.0, 0.0))


def test_noise_scale_of_a_number_of_parts_known_only_on_the_device():
    """As with a plain number; one part says nothing about noise."""
    plain = noise_scale(5.0, 2.0, 1, 4)
    traced = jax.jit(lambda n: noise_scale(5.0, 2.0, 1, n))
    assert {k: float(v) for k, v in traced(4.0).items()} == pytest.approx({k: float(v) for k, v in plain.items()})
    assert all(np.isnan(float(v)) for v in traced(1.0).values())
