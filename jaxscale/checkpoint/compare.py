"""Which arrays a state has, and how two states differ. Read next: `restore.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxscale import tree
from jaxscale.checkpoint.manifest import Arrays
from jaxscale.config import ConfigError


class StateMismatch(ConfigError):
    """The checkpoint holds a state of other arrays than this run wants."""


def describe(state: Mapping[str, Any]) -> Arrays:
    """Shape and dtype of every array of a state, by path. Raises TypeError for a leaf that is no array."""
    arrays: Arrays = {}
    for path, leaf in tree.flatten(state).items():
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(
                f"{path} of the state is a {type(leaf).__name__}; a state holds jax arrays only; "
                "values of the host go into the Record"
            )
        arrays[path] = (tuple(leaf.shape), str(leaf.dtype))
    return arrays


def differences(saved: Arrays, wanted: Arrays) -> list[str]:
    """One line per array that the two trees do not share, by path, with both shapes and dtypes. Pure."""

    def text(array: tuple[tuple[int, ...], str] | None) -> str:
        return "absent" if array is None else f"{array[1]}[{','.join(map(str, array[0]))}]"

    return [
        f"{path}: checkpoint {text(saved.get(path))}, this run {text(wanted.get(path))}"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
