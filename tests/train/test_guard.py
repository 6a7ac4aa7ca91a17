"""The spike guard by itself: single spikes are skipped, a new level is accepted after a bounded number of skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.train import guard

LIMIT = 6.0


@jax.jit
def _decide(window, loss):
    norm = jnp.where(jnp.isfinite(loss), 1.0, jnp.nan)
    accepted = guard.accepts(window, loss, norm, guard.spike_score(window, loss), LIMIT)
    return guard.push(window, loss, norm), accepted


def accepted_of(losses, size=128, window=None):
    """Which updates with these losses are applied, and the window at the end."""
    window = guard.empty_window(size) if window is None else window
    out = []
    for loss in losses:
        window, accepted = _decide(window, jnp.float32(loss))
        out.append(bool(accepted))
    return out, window


def noisy(level, count, seed=0):
    return (level + 0.05 * np.random.default_rng(seed).normal(size=count)).tolist()


def longest_skip(accepted):
    return max(map(len, "".join("a" if one else "s" for one in accepted).split("a")))


@pytest.mark.parametrize("size", [32, 128])
def test_single_spikes_are_skipped_and_a_new_level_is_accepted(size):
    quiet = noisy(2.0, 140)
    spiked = [*quiet, 4.0, *noisy(2.0, 12, 1), 5.0, 4.0, *noisy(2.0, 12, 2), 4.0]
    accepted, window = accepted_of(spiked, size)
    assert [i for i, ok in enumerate(accepted) if not ok] == [140, 153, 154, 167]
    accepted, _ = accepted_of(noisy(4.0, 200, 3), size, window)
    first = accepted.index(True)
    assert 2 <= first <= guard.PERSISTS
    assert all(accepted[first:]), "what was accepted as a level stays accepted"


@pytest.mark.parametrize("size", [8, 12, 16])
def test_a_window_too_short_to_judge_again_moves_its_median(size):
    accepted, window = accepted_of([*noisy(2.0, 40), 4.0], size)
    assert not accepted[-1]
    accepted, _ = accepted_of(noisy(4.0, 40, 3), size, window)
    assert 2 <= accepted.index(True) <= guard.FEWEST
    assert longest_skip(accepted) <= guard.FEWEST


def test_after_a_new_level_spikes_above_it_are_skipped():
    accepted, _ = accepted_of([*noisy(2.0, 140), *noisy(4.0, 140, 1), 8.0, *noisy(4.0, 5, 2)])
    assert not accepted[280]
    assert all(accepted[281:])


@settings(max_examples=40, deadline=None)
@given(losses=st.lists(st.floats(-1e6, 1e6, width=32), min_size=20, max_size=60), size=st.sampled_from([18, 24]))
def test_never_more_than_a_few_finite_ones_in_a_row(losses, size):
    accepted, _ = accepted_of(losses, size)
    assert longest_skip(accepted) <= guard.PERSISTS


def test_a_loss_that_only_rises():
    accepted, _ = accepted_of([*noisy(2.0, 140), *(2.0 * 1.5**n for n in range(1, 60))])
    assert longest_skip(accepted) == guard.PERSISTS


def test_what_is_not_finite_is_skipped_for_ever_and_leaves_no_trace():
    _, before = accepted_of(noisy(2.0, 140))
    accepted, after = accepted_of([np.nan, np.inf] * 30, window=before)
    assert not any(accepted)
    assert np.asarray(after).tobytes() == np.asarray(before).tobytes()
