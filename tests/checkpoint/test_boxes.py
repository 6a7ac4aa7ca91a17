"""Boxes: intersections, slices and covers against plain masks, and against large regular grids."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.checkpoint import boxes


def ranges(size):
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def shapes_and_boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    box = st.tuples(*(ranges(size) for size in shape))
    return shape, draw(box), draw(st.lists(box, max_size=8))


def mask_of(shape, parts):
    mask = np.zeros(shape, bool)
    for box in parts:
        mask[tuple(slice(*pair) for pair in box)] = True
    return mask


@settings(max_examples=400, deadline=None)
@given(shapes_and_boxes())
def test_uncovered_agrees_with_a_mask(case):
    shape, target, parts = case
    mask = mask_of(shape, parts)
    gap = boxes.uncovered(target, parts)
    inside = mask[tuple(slice(*pair) for pair in target)]
    assert (gap is None) == bool(inside.all())
    if gap is not None:
        assert boxes.volume(gap) > 0
        assert boxes.intersect(gap, target) == gap
        assert not mask[tuple(slice(*pair) for pair in gap)].any()


@settings(max_examples=200, deadline=None)
@given(shapes_and_boxes(), st.randoms())
def test_an_intersection_names_the_same_elements_in_both_boxes(case, random):
    shape, one, parts = case
    if not parts:
        return
    other = random.choice(parts)
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    shared = boxes.intersect(one, other)
    expected = mask_of(shape, [one]) & mask_of(shape, [other])
    if shared is None:
        assert not expected.any()
        return
    left = numbers[tuple(slice(*pair) for pair in one)][boxes.within(shared, one)]
    right = numbers[tuple(slice(*pair) for pair in other)][boxes.within(shared, other)]
    assert np.array_equal(left, right)
    assert sorted(np.ravel(left)) == list(np.ravel(numbers[expected]))


@pytest.mark.parametrize("counts", [(4096,), (64, 64), (16, 16, 16), (1, 4096), (4, 1, 1024)])
def test_a_regular_grid_of_thousands_of_boxes_is_covered_until_one_is_missing(counts):
    axes = [[(3 * i, 3 * i + 3) for i in range(count)] for count in counts]
    grid = list(itertools.product(*axes))
    target = tuple((0, 3 * count) for count in counts)
    assert boxes.uncovered(target, grid) is None
    missing = grid.pop(1234)
    assert boxes.uncovered(target, grid) == missing


def test_scalars_and_empty_arrays():
    assert boxes.uncovered((), []) == ()
    assert boxes.uncovered((), [()]) is None
    assert boxes.uncovered(((0, 0), (0, 4)), []) is None
    assert boxes.volume(()) == 1
    assert boxes.intersect((), ()) == ()


def test_a_box_outside_the_array_does_not_fit():
    assert boxes.fits(((0, 4), (2, 2)), (4, 8))
    for box in [((0, 5), (0, 8)), ((-1, 4), (0, 8)), ((3, 2), (0, 8)), ((0, 4),)]:
        assert not boxes.fits(box, (4, 8))


def test_box_of_an_index_as_jax_gives_it():
    assert boxes.box_of((slice(None), slice(4, 8, None), slice(0, 3, 1)), (2, 8, 3)) == ((0, 2), (4, 8), (0, 3))
    assert boxes.box_of((), ()) == ()
    assert boxes.box_of((slice(5, 3),), (8,)) == ((5, 5),)
    with pytest.raises(ValueError, match="skips elements"):
        boxes.box_of((slice(0, 8, 2),), (8,))
    with pytest.raises(ValueError, match="1 slices into an array of 2 dims"):
        boxes.box_of((slice(0, 8),), (8, 8))


def test_text_for_people():
    assert boxes.text(((0, 8), (16, 32))) == "[0:8, 16:32]"
