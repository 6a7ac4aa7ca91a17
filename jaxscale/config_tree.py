"""A config as a nested plain dict: flattened to paths, compared, checked, printed, hashed. All pure.

Read next: `config_file.py`, the way back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

PLACEMENT = frozenset(
    [
        *("steps", "on", "devices", "mesh", "state", "run", "checkpoint", "memory", "evaluate", "sample"),
        *("data.cache", "data.prefetch"),
    ]
)
"""Fields that say where and how long a run goes, not what it computes: they may change on a resume without a word."""


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config, tuples as lists, with the model's class name under `model/kind`."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            out = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            # A `ModelConfig` is what builds a task; its class would have to be imported from where this is imported.
            return {"kind": type(value).__name__, **out} if hasattr(value, "task") else out
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def to_text(config: Any) -> str:
    """The golden dump: one `path = value` line per field, in order."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in flatten(to_dict(config)).items())


def config_hash(config: Any) -> str:
    """Eight hex digits that change with what the run computes, not with where it runs."""
    return tree_hash(to_dict(config))


def tree_hash(tree: Mapping[str, Any]) -> str:
    """`config_hash` of a config that is a `to_dict` tree already."""
    kept = {k: v for k, v in flatten(dict(tree)).items() if not _is_placement(k)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `path: old -> new` of the fields that differ between two `to_dict` trees."""
    a, b = flatten(old), flatten(new)
    missing = "(absent)"
    return [
        f"{key}: {json.dumps(a.get(key, missing))} -> {json.dumps(b.get(key, missing))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def not_finite(tree: dict[str, Any]) -> dict[str, Any]:
    """The fields that are, or hold, an infinity or no number: JSON, which config.json is written in, has no such."""

    def is_finite(value: Any) -> bool:
        if isinstance(value, list | dict):
            return all(map(is_finite, value.values() if isinstance(value, dict) else value))
        return not isinstance(value, float) or math.isfinite(value)

    return {path: value for path, value in flatten(tree).items() if not is_finite(value)}


def _is_placement(key: str) -> bool:
    return any(key == place or key.startswith(place + ".") for place in PLACEMENT)
