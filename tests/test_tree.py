"""Paths into nested dicts."""

import pytest

from jaxscale import tree


def test_round_trip_keeps_order():
    nested = {"b": {"y": 1, "x": {"z": 2}}, "a": 3}
    flat = tree.flatten(nested)
    assert list(flat.items()) == [("b/y", 1), ("b/x/z", 2), ("a", 3)]
    assert tree.unflatten(flat) == nested
    assert list(tree.unflatten(flat)) == ["b", "a"]


def test_empty_branches_vanish():
    assert tree.flatten({"a": {}, "b": 1}) == {"b": 1}
    assert tree.unflatten({}) == {}


@pytest.mark.parametrize("key", ["a/b", 3])
def test_keys_that_would_not_come_apart_are_refused(key):
    with pytest.raises(ValueError, match="keys are strings"):
        tree.flatten({"top": {key: 1}})


@pytest.mark.parametrize("paths", [["a", "a/b"], ["a/b", "a"], ["a/b", "a/b/c/d"]])
def test_a_path_through_a_leaf_is_refused(paths):
    with pytest.raises(ValueError, match="leaf"):
        tree.unflatten(dict.fromkeys(paths, 1))


def test_map_paths():
    assert tree.map_paths(lambda path, a, b: (path, a + b), {"x": {"y": 1}}, {"x": {"y": 2}}) == {
        "x": {"y": ("x/y", 3)}
    }
    with pytest.raises(ValueError, match="z"):
        tree.map_paths(lambda path, a, b: a, {"x": 1}, {"x": 1, "z": 2})  # noqa: ARG005 - names show the contract
