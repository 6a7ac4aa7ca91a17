"""Whether a step is what was written: every file read and hashed, every array covered by its shards.

No JAX. Works at any place (`../storage/store.py`), a run directory or a bucket. What a listing believes (`listing.py`)
is cheaper: names and sizes. Read next: `scrub.py`, which verifies slowly and repairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from jaxscale.checkpoint import layout, step_copy
from jaxscale.checkpoint.boxes import text, uncovered, whole
from jaxscale.checkpoint.manifest import DamagedCheckpoint, FileEntry, Manifest, StoredShard
from jaxscale.storage.local_store import LocalStore
from jaxscale.storage.store import Store

CHUNK_BYTES = 1 << 22
"""Read at once from a folder: whoever reads at a bounded rate waits between chunks."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a step."""

    reason: str
    """Names the file as it lies at its place."""
    file: str = ""
    """Below the step's folder; empty where it is of no single file."""
    shard: str = ""
    """Path and box of the array's parts that are lost with it; empty where the file holds none."""


Read = Callable[[int], None]
"""Told of so many bytes, once they are read."""


def verify_step(store: Store, step: int, read: Read = lambda _: None) -> list[Damage]:
    """All that is wrong with a finished step (`listing.look` says whether it is one); nothing where it is whole.

    Whatever lies there is damage and no error. Raises OSError where a place fails that is no folder of this machine.
    """
    folder = step_copy.folder_of(step)
    where = f"{store.address}/{folder}"
    try:
        data, manifest = step_copy.read_manifest(store, step)
        there = store.files(folder)
    except DamagedCheckpoint as error:
        return [Damage(str(error), layout.MANIFEST)]
    except OSError as error:
        if not isinstance(store, LocalStore):
            raise
        return [Damage(f"{where} cannot be read ({error.strerror or error})", layout.MANIFEST)]
    found = [*_uncovered(where, manifest)]
    if layout.json_text(json.loads(data)).encode() != data:  # the same value, from other bytes
        found.append(
            Damage(f"{where}/{layout.MANIFEST} is damaged: these are not the bytes of a manifest", layout.MANIFEST)
        )
    held: dict[str, list[tuple[str, StoredShard]]] = {}
    for name, shards in manifest.shards.items():
        for shard in shards:
            held.setdefault(shard.file, []).append((name, shard))
    for name, entry in sorted(manifest.files.items()):
        shards_here = held.get(name, [])
        lost = ", ".join(f"{array} {text(shard.box)}" for array, shard in shards_here)
        reason = _file(store, f"{folder}/{name}", entry, there.get(name), shards_here, read)
        found += [Damage(f"{where}/{name} {reason}", name, lost)] if reason else []
    return [*found, *(_record(store, step, manifest) if not found else ())]


def _uncovered(where: str, manifest: Manifest) -> Iterator[Damage]:
    for name, (shape, _) in manifest.arrays.items():
        gap = uncovered(whole(shape), [shard.box for shard in manifest.shards[name]])
        if gap is not None:
            part = f"{name} {text(gap)}"
            yield Damage(f"{where}/{layout.MANIFEST} names no file that holds {part}", layout.MANIFEST, part)


def _file(
    store: Store,
    name: str,
    entry: FileEntry,
    size: int | None,
    shards: list[tuple[str, StoredShard]],
    read: Read,
) -> str:
    """What is wrong with a file; empty where nothing is."""
    if size is None:
        return "is missing"
    if size != entry.nbytes:
        return f"has {size} bytes; it was written with {entry.nbytes}"
    of_file, of_shards, done = xxhash.xxh3_128(), [xxhash.xxh3_128() for _ in shards], 0
    while done < entry.nbytes:
        try:
            chunk = memoryview(store.read(name, done, min(CHUNK_BYTES, entry.nbytes - done)))
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            if not isinstance(store, LocalStore):
                raise
            return f"cannot be read ({error.strerror or error})"
        if not chunk:
            return f"has {done} bytes; it was written with {entry.nbytes}"
        of_file.update(chunk)
        for digest, (_, shard) in zip(of_shards, shards, strict=True):
            digest.update(chunk[max(0, shard.offset - done) : max(0, shard.offset + shard.nbytes - done)])
        done += len(chunk)
        read(len(chunk))
    if of_file.hexdigest() != entry.digest:
        return "is damaged: its digest does not fit"
    for digest, (array, shard) in zip(of_shards, shards, strict=True):
        if digest.hexdigest() != shard.digest:
            return f"is whole, and not the bytes that {array} {text(shard.box)} had in memory"
    return ""


def _record(store: Store, step: int, manifest: Manifest) -> Iterator[Damage]:
    """The small files are those that were written; are they those of a step?"""
    path = Path(store.address, step_copy.folder_of(step))
    for name in layout.RECORD:
        if name not in manifest.files:
            yield Damage(f"{path / layout.MANIFEST} does not name {name}", name)
            return
    try:
        fields, config, environment = (_json(store, step, name) for name in layout.RECORD)
        layout.record_of(fields, config, environment, path)
    except (DamagedCheckpoint, ValueError, FileNotFoundError) as error:
        yield Damage(str(error), layout.RECORD[0])


def _json(store: Store, step: int, name: str) -> dict[str, Any]:
    found = json.loads(store.read(f"{step_copy.folder_of(step)}/{name}"))
    if not isinstance(found, dict):
        raise ValueError(f"{store.address}/{step_copy.folder_of(step)}/{name} holds no object")
    return found
