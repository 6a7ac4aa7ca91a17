"""Paths into nested dicts: parameters, optimizer state and checkpoints all name an array by keys joined with "/".

`{"layers": {"attention": {"q": x}}}` holds the path `layers/attention/q`. Pure Python, works
inside jit. Read next: `task.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {path: leaf}, in the order of the dicts. Empty dicts have no leaf and vanish.

    Raises ValueError for a key that is not a string or has a "/": its path could not be taken apart again.
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise ValueError(f"key {key!r} under {prefix or 'the root'!r}: keys are strings without '/'; rename it")
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{prefix}{key}/"))
        else:
            out[prefix + key] = value
    return out


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict. Raises ValueError where one path runs through another's leaf."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} runs through {parent!r}, which is already a leaf; rename one of them")
        if last in node:
            raise ValueError(f"path {path!r} is both a leaf and a branch; rename one of them")
        node[last] = leaf
    return tree


def map_paths(function: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `function(path, leaf, *leaves of the others)` to every leaf; all trees have the same paths.

    Raises ValueError naming the paths that only some of the trees have.
    """
    leaves, *rest = flatten(tree), *(flatten(other) for other in others)
    for other in rest:
        if odd := sorted(leaves.keys() ^ other.keys()):
            raise ValueError(f"trees differ at {', '.join(odd)}; map_paths needs the same paths in each")
    return unflatten({path: function(path, leaf, *(other[path] for other in rest)) for path, leaf in leaves.items()})
