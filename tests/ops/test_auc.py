"""Areas under the ROC curve against the definition: pairs counted one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes
from jaxscale.ops.auc import BINS, LIMIT, binned_auc, exact_auc, histograms


def by_pairs(labels, scores):
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels == 1] for n in scores[labels == 0]]
    return np.mean(pairs)


def draw(count, coarse):
    generator = np.random.default_rng(count)
    scores = generator.normal(size=count) * 3
    labels = (generator.random(count) < 1 / (1 + np.exp(-scores))).astype(np.float32)
    return labels, (np.round(scores) if coarse else scores).astype(np.float32)


@pytest.mark.parametrize("coarse", [False, True])
def test_exact_area(coarse):
    labels, scores = draw(200, coarse)
    assert exact_auc(labels, scores) == pytest.approx(by_pairs(labels, scores), abs=1e-12)
    assert exact_auc(labels, -scores) == pytest.approx(1 - by_pairs(labels, scores), abs=1e-12)


def test_one_class_alone_has_no_area():
    assert np.isnan(exact_auc(np.ones(3), np.arange(3)))
    assert np.isnan(binned_auc(np.array([[0.0, 0], [1, 2]]))).all()


@pytest.mark.parametrize("scale", [1.0, 0.001, 100.0])
def test_binned_area_is_within_its_error(scale):
    """On four devices; small scores fall into few bins, large ones beyond the last, padding counts nothing."""
    labels, scores = draw(400, coarse=False)
    weights = (np.arange(400) % 8 > 0).astype(np.float32)
    real = weights > 0
    shape = tuple(4 if axis == "fsdp" else 1 for axis in axes.AXES)
    with jax.set_mesh(jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:4])):
        put = [jax.device_put(x, axes.sharding(("act_batch",))) for x in (scores * scale, labels, weights)]
        counts = np.asarray(jax.jit(histograms)(*put))
    assert counts.sum(axis=1).tolist() == [(1 - labels[real]).sum(), labels[real].sum()]
    area, error = binned_auc(counts)
    assert abs(area - by_pairs(labels[real], scores[real])) <= error + 1e-12
    assert error < 0.3
    if scale == 1:
        assert error < 0.002


def test_scores_beyond_the_limit_are_kept():
    shape = (1,) * len(axes.AXES)
    with jax.set_mesh(jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:1])):
        spec = axes.sharding(("act_batch",))
        logit, label, weight = (jax.device_put(jnp.float32(x), spec) for x in ([-99, 99, LIMIT], [0, 1, 1], [1, 1, 1]))
        counts = np.asarray(histograms(logit, label, weight))
    assert (counts[0, 0], counts[1, BINS - 1]) == (1, 2)
