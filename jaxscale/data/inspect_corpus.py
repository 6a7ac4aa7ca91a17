"""Looking at token folders: is one whole, what is in it, and how two differ. Read next: `commands/data_folders.py`."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.manifest import MANIFEST, Manifest, load_manifest
from jaxscale.data.shards import DamagedShard, damaged_shards
from jaxscale.data.token_file import DOCUMENT_BYTES, DOCUMENTS, TOKENS, Header, load_header, open_token_file

BUILDING = ".building"
_SHOWN = 3


def find_damage(folder: Path) -> list[str]:
    """Everything in a token folder that is not what was built, one line each; empty = it is sound. Reads all of it."""
    try:
        header = load_header(folder)
        manifest = load_manifest(folder)
    except DataError as error:
        found = [str(error)]
        if isinstance(error, DamagedData) and MANIFEST not in str(error):  # the manifest may still name the rest
            found += _named(folder, None, load_manifest_or_none(folder))
        return found
    if manifest is not None and (manifest["content"], manifest["plan"]) != (header.content, header.plan):
        return [f"{folder}: {MANIFEST} and header.json are of different builds; build the folder again"]
    if found := _named(folder, header, manifest):
        return found
    try:
        open_token_file(folder).verify()
    except DataError as error:
        return [str(error)]
    return []


def damage_in_words(folder: Path) -> str:
    """Damaged shards and their documents, as a part of a message; empty where no manifest says what was built."""
    header = None
    with contextlib.suppress(DataError):
        header = load_header(folder)
    found = [line.removeprefix(f"{folder}: ") for line in _named(folder, header, load_manifest_or_none(folder))]
    if not found:
        return ""
    more = f" and {len(found) - _SHOWN} more (`jaxscale data verify`)" if len(found) > _SHOWN else ""
    return f". Damaged: {'. '.join(found[:_SHOWN])}{more}"


def load_manifest_or_none(folder: Path) -> Manifest | None:
    """None also where it is damaged."""
    try:
        return load_manifest(folder)
    except DataError:
        return None


def _named(folder: Path, header: Header | None, manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return []
    damaged = damaged_shards(folder, manifest["files"], manifest["shard_bytes"])
    offsets = None
    if header is not None and not any(one.file == DOCUMENTS for one in damaged):
        offsets = np.memmap(folder / DOCUMENTS, "<i8", "r")
    return [f"{folder}: {one.message}{_documents(one, header, offsets, manifest)}" for one in damaged]


def _documents(shard: DamagedShard, header: Header | None, offsets: np.ndarray | None, manifest: Manifest) -> str:
    """Which documents a damaged shard holds, and of which inputs; empty where that cannot be said."""
    if header is None or shard.number < 0:
        return ""
    if shard.file == TOKENS and offsets is not None:
        itemsize = np.dtype(header.dtype).itemsize
        first = int(np.searchsorted(offsets, shard.start // itemsize, "right")) - 1
        last = int(np.searchsorted(offsets, -(-shard.stop // itemsize), "left")) - 1
    elif shard.file in (DOCUMENTS, DOCUMENT_BYTES):
        first, last = shard.start // 8, -(-shard.stop // 8) - 1
    else:
        return ""
    first, last = (min(max(number, 0), header.documents - 1) for number in (first, last))
    ends = list(itertools.accumulate(parent["documents"] for parent in manifest["parents"]))
    parents = manifest["parents"][bisect.bisect_right(ends, first) : bisect.bisect_right(ends, last) + 1]
    names = [parent["name"] for parent in parents if parent["documents"]]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"; it has documents {first}-{last}, of {shown}"


def token_folders(place: Path) -> list[Path]:
    """`place` itself where it is a token folder, otherwise those in it, finished or not. Raises DataError."""
    if not place.is_dir():
        raise DataError(f"{place} is no folder; give a token folder, or a folder with some")
    if (place / "header.json").is_file() or (place / TOKENS).is_file():
        return [place]
    return sorted(
        path
        for path in place.iterdir()
        if path.is_dir() and ((path / TOKENS).is_file() or path.name.endswith(BUILDING))
    )


def differences(old: Path, new: Path) -> list[str]:
    """What two token folders do not have in common, one line each. Raises DataError where one cannot be read."""
    headers = [load_header(folder) for folder in (old, new)]
    manifests = [load_manifest(folder) for folder in (old, new)]
    if None in manifests:
        sides = [{"header": _plain_header(header)} for header in headers]
    else:
        sides = [_comparable(manifest) for manifest in manifests if manifest is not None]
    flat = [dict(_flatten(side)) for side in sides]
    lines = []
    for name in [*flat[0], *(name for name in flat[1] if name not in flat[0])]:
        before, after = (one.get(name) for one in flat)
        if before != after:
            lines.append(f"{name}: {_shown(before)} -> {_shown(after)}")
    return lines


def _comparable(manifest: Manifest) -> dict[str, Any]:
    left_out = ("digest", "files", "examples", "format", "parents")
    side = {name: value for name, value in manifest.items() if name not in left_out}
    return {**side, "parent": {parent["name"]: parent for parent in manifest["parents"]}}


def _plain_header(header: Header) -> dict[str, Any]:
    return {
        name: getattr(header, name) for name in ("content", "plan", "tokens", "documents", "bytes", "tokenizer_hash")
    }


def _flatten(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flatten(inner, f"{before}{name}.")
        elif not isinstance(inner, Mapping) and name != "name":
            yield f"{before}{name}", inner


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return (
        f"{value:,}"
        if isinstance(value, int)
        else ", ".join(value) or "nothing"
        if isinstance(value, list)
        else str(value)
    )
