"""Schedules against closed forms, and the sentences about them."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxscale.config import OptimConfig
from jaxscale.optim.schedules import _at, describe, make_schedule

CASES = [
    OptimConfig(schedule=schedule, warmup=warmup, final=final, decay=decay)
    for schedule in ("constant", "cosine", "wsd")
    for warmup in (0, 10)
    for final in (0.0, 0.1)
    for decay in (0.2, 1.0)
]


def closed_form(optim: OptimConfig, steps: int, i: int) -> float:
    if i < optim.warmup:
        return (i + 1) / (optim.warmup + 1)
    if optim.schedule == "constant":
        return 1.0
    if i >= steps:
        return optim.final
    if optim.schedule == "cosine":
        angle = math.pi * (i - optim.warmup) / (steps - optim.warmup)
        return optim.final + (1 - optim.final) * (1 + math.cos(angle)) / 2
    start = max(optim.warmup, steps - round(optim.decay * steps))
    return 1.0 if i < start else 1 - (1 - optim.final) * (i - start) / (steps - start)


@pytest.mark.parametrize("optim", CASES, ids=str)
def test_closed_form(optim):
    steps = jnp.arange(130, dtype=jnp.int32)
    shares = jax.jit(jax.vmap(make_schedule(optim, 100)))(steps)
    assert shares.dtype == jnp.float32
    for i, share in enumerate(shares.tolist()):
        assert share == pytest.approx(closed_form(optim, 100, i), abs=1e-6), i
        assert _at(optim, 100, i) == pytest.approx(optim.learning_rate * share, rel=1e-5, abs=1e-9)


def test_landmarks():
    cosine = make_schedule(OptimConfig(schedule="cosine", warmup=3, final=0.1), 103)
    assert [float(cosine(i)) for i in (0, 1, 2, 3)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert float(cosine(53)) == pytest.approx(0.55)
    assert float(cosine(103)) == pytest.approx(0.1)
    wsd = make_schedule(OptimConfig(schedule="wsd", decay=0.2, final=0.0), 100)
    assert [float(wsd(i)) for i in (0, 80, 90, 99, 100, 1000)] == pytest.approx([1, 1, 0.5, 0.05, 0, 0], abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 8, 20])
def test_short_runs_and_long_warmups_stay_within_bounds(schedule, warmup):
    for steps in (1, 2, 8):
        share = make_schedule(OptimConfig(schedule=schedule, warmup=warmup, decay=0.01), steps)
        values = [float(share(i)) for i in range(30)]
        assert all(0 < v <= 1 for v in values)
        assert max(values[:30]) == pytest.approx(1.0) or steps <= warmup
        assert values[0] == pytest.approx(1 / (warmup + 1))


def test_a_longer_run_continues_where_the_schedules_agree():
    short, long = (make_schedule(OptimConfig(schedule="wsd", decay=0.2), steps) for steps in (100, 200))
    assert all(float(short(i)) == float(long(i)) for i in range(81))


def test_describe_what_more_steps_change():
    cosine = OptimConfig(schedule="cosine", learning_rate=3e-4, final=0.1)
    assert describe(cosine, 500, 300) == (
        "cosine decays over 500 steps instead of 300: the learning rate at step 300 rises from 3.0e-05 to 1.2e-04"
    )
    wsd = OptimConfig(schedule="wsd", learning_rate=3e-4, final=0.1, decay=0.2)
    assert describe(wsd, 500, 300) == (
        "wsd decays over steps 400-500 instead of 240-300: the learning rate at step 300 rises from 3.0e-05 to 3.0e-04"
    )
    assert "falls from 1.2e-04 to 3.0e-05" not in describe(cosine, 300, 500)  # at step 500 both are at the end
    assert describe(cosine, 300, 500).endswith("at step 500 stays at 3.0e-05")
    constant = OptimConfig(schedule="constant", learning_rate=3e-4)
    assert describe(constant, 500, 300) == "constant: 300 steps become 500, the learning rate stays at 3.0e-04"


def test_describe_what_other_settings_change():
    """What was before is computed with the settings of before."""
    cosine, fast = (OptimConfig(schedule="cosine", learning_rate=rate, final=0.1) for rate in (3e-4, 3e-3))
    assert describe(fast, 500, 300, cosine) == (
        "cosine decays over 500 steps instead of 300: the learning rate at step 300 rises from 3.0e-05 to 1.2e-03"
    )
    assert describe(fast, 500, 300, fast) == describe(fast, 500, 300)
    early = OptimConfig(schedule="wsd", learning_rate=3e-4, final=0.1, decay=0.5)
    late = OptimConfig(schedule="wsd", learning_rate=3e-4, final=0.1, decay=0.2)
    assert describe(late, 500, 300, early).startswith("wsd decays over steps 400-500 instead of 150-300: ")
    constant, slow = (OptimConfig(schedule="constant", learning_rate=rate) for rate in (3e-4, 1e-4))
    assert describe(slow, 500, 300, constant) == (
        "constant: 300 steps become 500, the learning rate falls from 3.0e-04 to 1.0e-04"
    )
    other = describe(constant, 500, 300, cosine)
    assert other.startswith("constant over 500 steps instead of cosine over 300: the learning rate at step 300 ")
    assert other.endswith("rises from 3.0e-05 to 3.0e-04")


def test_describe_a_schedule():
    assert describe(OptimConfig(schedule="cosine", warmup=5), 300) == (
        "cosine: warmup over 5 steps, then from 3.0e-04 to 3.0e-05 at step 300"
    )
    assert describe(OptimConfig(schedule="wsd"), 300, 300) == (
        "wsd: 3.0e-04 until step 240, then a line to 3.0e-05 at step 300"
    )
    assert describe(OptimConfig(schedule="constant"), 300) == "constant: 3.0e-04 for all of 300 steps"
