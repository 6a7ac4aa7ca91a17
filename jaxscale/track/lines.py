"""One line of metrics as JSON that any parser reads, with every float coming back bit for bit.

JSON has no NaN and no infinity: such a value is written as null, and the line's `nonfinite` field, a dict of the same
shape, says which it was: `{"loss": null, "nonfinite": {"loss": "nan"}}`. Read next: `jsonl.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NONFINITE = "nonfinite"


def encode(line: Mapping[str, Any]) -> bytes:
    """A line with its line end. Scalars of numpy and JAX become numbers. Raises TypeError for what JSON cannot hold."""
    return json.dumps(mark(line), allow_nan=False).encode() + b"\n"


def decode(text: bytes | str) -> dict[str, Any]:
    """The line that `encode` was given. Raises ValueError for anything that is not a whole line."""
    line = json.loads(text, parse_constant=_refuse)
    if not isinstance(line, dict):
        raise ValueError(f"a line holds a JSON object, this one a {type(line).__name__}")
    return unmark(line)


def mark(line: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values, with those that JSON lacks moved to `nonfinite`. Raises ValueError if the line uses that name."""
    if NONFINITE in line:
        raise ValueError(f"a metric is called {NONFINITE!r}, which marks NaN and infinity in metrics.jsonl; rename it")
    flags: dict[str, Any] = {}
    marked: dict[str, Any] = _mark(line, flags)
    return {**marked, NONFINITE: flags} if flags else marked


def unmark(line: dict[str, Any]) -> dict[str, Any]:
    """Undoes `mark`. Raises ValueError where the flags do not fit the line."""
    flags = line.get(NONFINITE)
    if flags is None:
        return line
    try:
        out: dict[str, Any] = _unmark({k: v for k, v in line.items() if k != NONFINITE}, flags)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the field {NONFINITE!r} does not fit its line ({error!r})") from error
    return out


def _mark(value: Any, flags: dict[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _child(str(key), item, flags) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_child(str(index), item, flags) for index, item in enumerate(value)]
    return value


def _child(key: str, value: Any, flags: dict[str, Any]) -> Any:
    if not isinstance(value, str | int | float | Mapping | list | tuple) and hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or JAX; float32 -> float64 keeps every bit
    if isinstance(value, float) and not math.isfinite(value):
        flags[key] = repr(float(value))
        return None
    inner: dict[str, Any] = {}
    marked = _mark(value, inner)
    if inner:
        flags[key] = inner
    return marked


def _unmark(value: Any, flags: Any) -> Any:
    if isinstance(flags, str):
        return float(flags)
    if isinstance(value, list):
        return [_unmark(item, flags[str(i)]) if str(i) in flags else item for i, item in enumerate(value)]
    return {key: _unmark(item, flags[key]) if key in flags else item for key, item in value.items()}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
