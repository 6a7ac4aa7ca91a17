"""Makes a durable step of what all hosts have written: checks that it is whole, seals it, commits it.

Run by whoever leads; no JAX. Until the commit file is there nobody takes the folder for a step, neither jaxscale nor
Orbax. Read next: `layout.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.boxes import text, uncovered, whole
from jaxscale.checkpoint.manifest import Arrays, DamagedCheckpoint
from jaxscale.checkpoint.written import Part, array_folder, merged, part_from_json, process_file
from jaxscale.checkpoint.zarr_files import array_metadata, as_text, checkpoint_metadata, chunk_shape, tree_metadata
from jaxscale.track import lines
from jaxscale.train.protocols import Record


def finalise(
    path: Path,
    ranks: int,
    epoch: int,
    mesh: Mapping[str, int],
    metrics: Path | None = None,
    allowed: Callable[[], None] = lambda: None,
) -> int:
    """Makes the step at `path` of the parts of that many ranks. Returns its bytes.

    `metrics`: a file that must be on the disk before the step counts. `allowed`: called just before the step comes to
    exist, and may raise. Raises DamagedCheckpoint where the parts do not
    make a whole, and OSError; the folder then is no step, and this may be called again.
    """
    parts, tables = zip(*(_part(path / process_file(rank)) for rank in range(ranks)), strict=True)
    step = int(path.name)
    if others := [rank for rank, table in enumerate(tables) if (table["epoch"], table["step"]) != (epoch, step)]:
        raise DamagedCheckpoint(f"{path}: what ranks {others} wrote is not of step {step}, epoch {epoch}")
    arrays: Arrays = {name: (tuple(shape), str(dtype)) for name, (shape, dtype) in tables[0]["arrays"].items()}
    part = merged(parts)
    chunks = {name: _chunk(path, name, shape, part) for name, (shape, _) in arrays.items()}
    for name, (shape, dtype) in arrays.items():
        _write(path / layout.STATE_ITEM / array_folder(name) / "zarr.json", array_metadata(shape, chunks[name], dtype))
    _write(path / layout.STATE_ITEM / "_METADATA", tree_metadata(arrays, chunks))
    _write(path / "_CHECKPOINT_METADATA", checkpoint_metadata(layout.STATE_ITEM))
    if metrics is not None:
        _sync(metrics)
    allowed()
    record = Record(**lines.unmark(tables[0]["record"]))
    commit = f"Checkpoint commit was successful to {path.name}"
    return layout.seal(path, record, arrays, part, mesh, commit=commit)


def _part(path: Path) -> tuple[Part, dict[str, Any]]:
    try:
        value = json.loads(path.read_bytes())
        return part_from_json(value), dict(value["table"])
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing: not all hosts have written their part") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} does not say what was written ({error!r})") from error


def _chunk(path: Path, name: str, shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    boxes = [shard.box for shard in part.shards.get(name, ())]
    if (gap := uncovered(whole(shape), boxes)) is not None:
        raise DamagedCheckpoint(f"{path}: nobody has written {name} {text(gap)}")
    try:
        return chunk_shape(name, boxes)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(as_text(value))
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)
