"""The cost model of collectives: closed forms, what is chosen by size, and the fit of a link to measurements."""

import math

import numpy as np
import pytest

from jaxscale.plan.collective_costs import (
    Link,
    best,
    best_bucket,
    best_flat,
    bucketed,
    buckets,
    fit,
    hierarchical,
    ring,
    seconds,
    sent_bytes,
    tree,
)

SLOW, FAST = Link(1e-3, 1e8), Link(1e-6, 1e11)


def simulated_ring(nbytes, devices, link):
    """Device by device: each sends a part to the next and waits for the one before, 2 (p - 1) times."""
    clock = [0.0] * devices
    for _ in range(2 * (devices - 1)):
        clock = [max(clock[d], clock[d - 1]) + link.latency + nbytes / devices / link.bandwidth for d in range(devices)]
    return max(clock)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_ring(devices):
    assert ring(1e6, devices, SLOW) == pytest.approx(simulated_ring(1e6, devices, SLOW))


def test_small_arrays_go_by_tree_and_large_ones_by_ring():
    assert best_flat(100, 16, SLOW)[0] == "tree"
    assert best_flat(1e9, 16, SLOW)[0] == "ring"
    assert tree(8, 16, SLOW) == pytest.approx(4e-3, rel=1e-3)
    assert ring(1e9, 1, SLOW) == tree(1e9, 1, SLOW) == 0


def test_large_sums_over_slices_are_hierarchical():
    name, took = best(1e9, 16, 2, FAST, SLOW)
    assert name == "hierarchical"
    assert took == pytest.approx(2 * 15 * (1e-6 + 1e9 / 16 / 1e11) + 1e-3 + 1e9 / 16 / 1e8)
    assert took < ring(1e9, 32, SLOW) / 10
    assert best(1e9, 16, 1, FAST, SLOW)[0] == "ring"
    assert hierarchical(1e6, 1, 2, FAST, SLOW) == best_flat(1e6, 2, SLOW)[1]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 1.5),
        ("all-gather", 0.75),
        ("reduce-scatter", 0.75),
        ("all-to-all", 0.75),
        ("collective-permute", 1),
    ],
)
def test_bytes(kind, sent):
    assert sent_bytes(kind, 1000, 4) == pytest.approx(1000 * sent)
    assert sent_bytes(kind, 1000, 1) == seconds(kind, 1000, 1, SLOW) == 0


def test_buckets():
    assert buckets([3, 3, 3, 10, 1], 6) == [[0, 1], [2], [3], [4]]
    sizes = [1e5] * 100
    assert bucketed(sizes, 1e5, 2, SLOW) == pytest.approx(100 * best_flat(1e5, 2, SLOW)[1])
    assert bucketed(sizes, 1e7, 2, SLOW) == pytest.approx(best_flat(1e7, 2, SLOW)[1])
    # All there at once: one message. One by one: some wait, and the link is not idle.
    assert best_bucket(sizes, 2, SLOW)[0] >= 1e7 / 2
    ready = [0.01 * i for i in range(100)]
    most, took = best_bucket(sizes, 2, SLOW, ready)
    assert 1e5 <= most < 1e7
    assert took < min(bucketed(sizes, 1e7, 2, SLOW, ready), 1.1)


@pytest.mark.parametrize("devices", [2, 4])
def test_fit_finds_the_link(devices):
    link = Link(3e-4, 5e7)
    noise = np.random.default_rng(0).uniform(0.97, 1.03, 50)
    points = [
        (kind, nbytes, seconds(kind, nbytes, devices, link) * noise[i])
        for i, (kind, nbytes) in enumerate((k, 2.0**e) for k in ("all-reduce", "all-gather") for e in range(8, 24))
    ]
    found = fit(points, devices)
    assert found.latency == pytest.approx(link.latency, rel=0.03)
    assert found.bandwidth == pytest.approx(link.bandwidth, rel=0.03)


def test_fit_of_odd_measurements_stays_possible():
    falling = [("all-gather", 100.0, 1e-3), ("all-gather", 1e6, 0.9e-3)]
    assert fit(falling, 2).bandwidth > 0
    assert math.isfinite(fit(falling, 2).latency)
    steep = [("all-gather", 100.0, 1e-9), ("all-gather", 1e6, 1.0)]
    assert fit(steep, 2).latency >= 0
    with pytest.raises(ValueError, match="two sizes"):
        fit([("all-gather", 100.0, 1.0)], 2)
