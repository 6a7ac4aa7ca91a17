"""Where rows of tables lie: no two at one place, spread over devices, and whole tables dealt out evenly."""

import numpy as np
import pytest

from jaxscale.parallel.table_layout import (
    PLACEMENTS,
    STRIPES,
    Bags,
    Bins,
    Feature,
    deal,
    padded_rows,
    position,
    stripe_rows,
)

BAGS = Bags((Feature(50, 2), Feature(3), Feature(700, 3), Feature(1), Feature(20)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_row_has_a_place_of_its_own(placement):
    places = [
        position(BAGS, placement, 4, feature, row)
        for feature, own in enumerate(BAGS.features)
        for row in range(own.rows)
    ]
    assert len(set(places)) == BAGS.rows == 774


@pytest.mark.parametrize("devices", [2, 3, 8, 12, 256])
@pytest.mark.parametrize("hot", [768, 3 * 1024])
def test_neighbours_are_spread_over_devices(devices, hot):
    """Of the first ids, which are the hot ones, each device has its share to within one stripe of each kind."""
    total = padded_rows(10 * STRIPES)
    owner = stripe_rows(np.arange(hot), total) // (total // devices)
    counts = np.bincount(owner, minlength=devices)
    assert counts.max() - counts.min() <= 3
    assert counts.sum() == hot


def test_stripes_are_a_permutation():
    assert sorted(stripe_rows(np.arange(2 * STRIPES), 2 * STRIPES)) == list(range(2 * STRIPES))
    assert (padded_rows(1), padded_rows(STRIPES), padded_rows(STRIPES + 1)) == (STRIPES, STRIPES, 2 * STRIPES)


def test_tables_are_dealt_by_cost():
    assert deal([5, 4, 3, 3, 3], 2) == ((0, 3), (1, 2, 4))
    assert deal([1, 1, 1], 4) == ((0,), (1,), (2,), ())
    assert deal([9, 1, 1, 1], 2) == ((0,), (1, 2, 3))
    generator = np.random.default_rng(0)
    for _ in range(50):
        costs = generator.integers(1, 1000, generator.integers(1, 40)).tolist()
        bins = int(generator.integers(1, 9))
        dealt = deal(costs, bins)
        assert sorted(table for tables in dealt for table in tables) == list(range(len(costs)))
        fullest = max(sum(costs[t] for t in tables) for tables in dealt)
        assert fullest <= sum(costs) / bins + max(costs)


def test_bins_as_arrays():
    bins = Bins(BAGS, 2)
    assert bins.tables == ((2,), (0, 1, 3, 4))
    assert (bins.features, bins.hots, bins.rows) == (4, 5, 700)
    assert bins.place.tolist() == [[1, 0], [1, 1], [0, 0], [1, 2], [1, 3]]
    assert bins.feature.tolist() == [[2, 5, 5, 5], [0, 1, 3, 4]]
    assert bins.columns.tolist() == [[3, 4, 5, 8, 8], [0, 1, 2, 6, 7]]
    assert bins.slot[1].tolist() == [0, 0, 1, 2, 3]
    assert bins.first_row[1].tolist() == [0, 0, 50, 53, 54]
