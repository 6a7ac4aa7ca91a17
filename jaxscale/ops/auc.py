"""Area under the ROC curve: the chance that a positive example scores above a negative one, ties counted half.

Exact by ranks on one host, or from histograms of scores, which devices and processes add up like any other sum, with a
bound of what the bins hide. Read next: `models/dlrm.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxscale import axes

BINS = 1 << 14
LIMIT = 16.0
"""Logits are binned evenly from -LIMIT to LIMIT, 512 bins a unit; those beyond count at the border."""


def exact_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """By ranks (Mann and Whitney 1947), all in float64; NaN where one of the classes is missing."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    rank = (last - (count - 1) / 2)[place]  # mean rank of equal scores, from 1
    positive = labels > 0
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def histograms(logit_B: jax.Array, label_B: jax.Array, weight_B: jax.Array) -> jax.Array:
    """Weight of negatives and positives by bin of their logit: (2, BINS) float32, replicated. All inputs P(batch)."""

    def body(logit_B: jax.Array, label_B: jax.Array, weight_B: jax.Array) -> jax.Array:
        place = jnp.clip((logit_B + LIMIT) * (BINS / (2 * LIMIT)), 0, BINS - 1).astype(jnp.int32)
        mine = jnp.zeros((2, BINS), jnp.float32).at[label_B.astype(jnp.int32), place].add(weight_B)
        return jax.lax.psum(mine, axes.BATCH_AXES)

    rows = axes.spec("act_batch")
    mapped = jax.shard_map(
        body, in_specs=(rows, rows, rows), out_specs=P(), axis_names=axes.automatic(), check_vma=False
    )
    return mapped(logit_B, label_B, weight_B)


def binned_auc(counts: np.ndarray) -> tuple[float, float]:
    """(area, how far it can be from the exact one at most) of histograms (2, BINS): negatives, positives.

    Pairs within a bin count half; whatever their order is, each of them is off by a half at most.
    """
    negatives, positives = counts.astype(np.float64)
    pairs = negatives.sum() * positives.sum()
    if pairs == 0:
        return float("nan"), float("nan")
    below = np.cumsum(negatives) - negatives
    tied = float((positives * negatives).sum())
    return float(((positives * below).sum() + tied / 2) / pairs), tied / 2 / float(pairs)
