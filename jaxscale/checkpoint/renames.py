"""Weights of another model: which of a checkpoint's arrays becomes which of this run's. Pure.

Nothing is passed over in silence. An array that is wanted and not there, one that is there and not wanted, and one of
another shape are differences; what is to become of each the map says, entry by entry:

    NEW=OLD   NEW comes from OLD; each is an array, or all arrays below a path
    NEW=      NEW stays as the run's seed makes it
    =OLD      OLD is left out

Of entries that fit, the one with the longest path counts. Read next: `restore.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from jaxscale.config import ConfigError

Array = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Taken:
    """What is loaded, and what is not."""

    sources: Mapping[str, str]
    """Path in this run -> path in the checkpoint."""
    fresh: tuple[str, ...]
    """Paths that stay as the seed makes them."""


@dataclass(frozen=True)
class Renames:
    """An explicit map; an empty one wants the same paths on both sides. Raises ConfigError for what is no map."""

    entries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in self.entries:
            new, sign, old = entry.partition("=")
            if not sign or "=" in old or not (new or old):
                raise ConfigError(
                    f"{entry!r} in --init-map is no entry; write NEW=OLD, NEW= (stays as the seed makes it) or =OLD "
                    "(left out)"
                )
            for path in filter(None, (new, old)):
                if path != path.strip("/") or "//" in path:
                    raise ConfigError(f"{path!r} in --init-map is no path; write it like layers/mlp/up")
        pairs = [(new, old) for new, _, old in (entry.partition("=") for entry in self.entries)]
        for side, paths in (("NEW", [new for new, _ in pairs]), ("OLD", [old for _, old in pairs])):
            if twice := sorted({path for path in paths if path and paths.count(path) > 1}):
                raise ConfigError(f"--init-map has {', '.join(twice)} as {side} more than once")

    @property
    def places(self) -> dict[str, str]:
        """NEW -> OLD, empty where it stays fresh."""
        return {new: old for new, _, old in (entry.partition("=") for entry in self.entries) if new}

    @property
    def left_out(self) -> list[str]:
        """What is not loaded."""
        return [old for new, _, old in (entry.partition("=") for entry in self.entries) if not new]

    def taken(self, wanted: Mapping[str, Array], saved: Mapping[str, Array]) -> tuple[Taken, list[str]]:
        """What becomes of each array, and a line for each difference that the map says nothing of."""
        places, olds = self.places, [old for _, _, old in (entry.partition("=") for entry in self.entries) if old]
        lines: list[str] = []
        sources: dict[str, str] = {}
        fresh: list[str] = []
        unfit: set[str] = set()
        for path, array in wanted.items():
            new = _longest(path, places)
            old = path if new is None else places[new] and places[new] + path.removeprefix(new)
            if not old:
                fresh.append(path)
            elif old not in saved:
                lines.append(f"{path}: this run {_text(array)}, checkpoint {_absent(path, old)}")
            elif saved[old] != array:
                unfit.add(old)
                lines.append(f"{path}: checkpoint {_text(saved[old])}{_as(path, old)}, this run {_text(array)}")
            elif old in sources.values():
                other = next(path for path, its in sources.items() if its == old)
                lines.append(f"{path}: comes from {old}, and so does {other}")
            else:
                sources[path] = old
        used = {*sources.values(), *unfit}
        for path, array in saved.items():
            if path not in used and _longest(path, self.left_out) is None:
                lines.append(f"{path}: checkpoint {_text(array)}, this run has no place for it")
        lines += [f"{new}: named in --init-map, and this run has no such weights" for new in _unknown(places, wanted)]
        lines += [
            f"{old}: named in --init-map, and the checkpoint has no such weights" for old in _unknown(olds, saved)
        ]
        return Taken(sources, tuple(fresh)), lines


def _longest(path: str, heads: Collection[str]) -> str | None:
    fits = [head for head in heads if path == head or path.startswith(head + "/")]
    return max(fits, key=len, default=None)


def _unknown(heads: Collection[str], paths: Collection[str]) -> Sequence[str]:
    return [head for head in heads if not any(path == head or path.startswith(head + "/") for path in paths)]


def _text(array: Array) -> str:
    return f"{array[1]}[{','.join(map(str, array[0]))}]"


def _absent(path: str, old: str) -> str:
    return "absent" if old == path else f"has no {old}"


def _as(path: str, old: str) -> str:
    return "" if old == path else f" ({old})"
