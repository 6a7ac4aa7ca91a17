"""From the chosen shards to a state on this process's devices, whatever mesh wrote them and whatever mesh there is now.

Each source shard is fetched once at most, by a few threads; what turns out damaged comes from its next location. Moves
bytes only: nothing is computed on a device, so nothing is compiled (but where slices left or joined: `by_slice.py`).
Read next: `restore.py`, the durable tier's way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding, SingleDeviceSharding

from jaxscale import tree
from jaxscale.checkpoint.boxes import Box, box_of, intersect, lengths, text, uncovered, within
from jaxscale.checkpoint.by_slice import as_stored, dealt
from jaxscale.checkpoint.compare import StateMismatch, describe, differences
from jaxscale.checkpoint.cover import Choice, Location, Source
from jaxscale.checkpoint.slot import SlotError, dtype_of

Fetch = Callable[[Location, Source], np.ndarray[Any, Any]]
"""Gives a verified copy of a source shard from one of its locations. Called by several threads at a time.

Raises SlotError or OSError where that is not to be had there.
"""

Rejected = Callable[[Source, Location, str], None]
"""Told of each location that did not give what it should, with the reason. Called by several threads at a time."""

THREADS = 4
MOST_SHOWN = 20


class NoGoodCopy(RuntimeError):
    """Parts of the chosen state cannot be had anywhere; says which, and what was wrong at each place."""


def assemble(
    abstract: Mapping[str, Any],
    choice: Choice,
    fetch: Fetch,
    rejected: Rejected | None = None,
    *,
    threads: int = THREADS,
) -> dict[str, Any]:
    """The chosen state as `jax.Array`s of exactly these shapes, dtypes and shardings; meets no other process.

    `abstract`: nested dict of `jax.ShapeDtypeStruct` with shardings on any mesh; an abstract mesh stands for the
    current one. Only what this process's devices need is fetched. Raises StateMismatch (lists what differs) before
    anything is fetched, and NoGoodCopy after every location of every shard was tried.
    """
    saved = {path: (info.shape, info.dtype) for path, info in choice.arrays.items()}
    stored = as_stored(abstract, saved)
    leaves = tree.flatten(stored)
    if lines := differences(saved, describe(stored)):
        raise StateMismatch(
            f"the checkpoint of step {choice.step} holds other arrays than this run:\n  {_first(lines)}\n"
            "use the model and optimizer settings it was written with, or start another run"
        )
    shardings = {path: concrete(leaf.sharding, path) for path, leaf in leaves.items()}
    targets = {path: _Target.of(leaf, shardings[path]) for path, leaf in leaves.items()}
    _check_covered(targets, choice)
    _fill(targets, choice, fetch, rejected or (lambda *_: None), threads)

    placed = iter(
        _put(
            [target.buffers[box] for target in targets.values() for box in target.devices.values()],
            [
                SingleDeviceSharding(device, memory_kind=shardings[path].memory_kind)
                for path, target in targets.items()
                for device in target.devices
            ],
        )
    )
    state = {}
    for path, leaf in leaves.items():
        parts = [next(placed) for _ in targets[path].devices]
        state[path] = jax.make_array_from_single_device_arrays(leaf.shape, shardings[path], parts, dtype=leaf.dtype)
    return dealt(tree.unflatten(jax.block_until_ready(state)), abstract)


def concrete(sharding: Sharding | None, path: str) -> Sharding:
    """A sharding on real devices: where its mesh is abstract, on the current one. Raises ValueError if that differs."""
    if sharding is None:
        raise ValueError(f"{path} has no sharding; give each array of the abstract state one")
    if not (isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.shape != sharding.mesh.shape:
        raise ValueError(
            f"{path} is sharded over the mesh {dict(sharding.mesh.shape)}, and the current one is {dict(mesh.shape)}; "
            "call this inside jax.set_mesh"
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


@dataclass
class _Target:
    """What this process's devices hold of one array."""

    dtype: np.dtype[Any]
    devices: dict[Any, Box]
    buffers: dict[Box, np.ndarray[Any, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, leaf: Any, sharding: Sharding) -> _Target:
        indices = sharding.addressable_devices_indices_map(leaf.shape)
        devices = {device: box_of(index or (), leaf.shape) for device, index in indices.items()}
        dtype = dtype_of(leaf.dtype.name)
        return cls(dtype, devices, {box: np.empty(lengths(box), dtype) for box in dict.fromkeys(devices.values())})


def _check_covered(targets: Mapping[str, _Target], choice: Choice) -> None:
    held: dict[str, list[Box]] = {}
    for source in choice.shards:
        held.setdefault(source.path, []).append(source.box)
    for path, target in targets.items():
        for box in target.buffers:
            if (gap := uncovered(box, held.get(path, ()))) is not None:
                raise NoGoodCopy(f"{path} {text(gap)} of step {choice.step} is in no slot; choose() would have refused")


def _fill(targets: Mapping[str, _Target], choice: Choice, fetch: Fetch, rejected: Rejected, threads: int) -> None:
    """Fetches what is needed into the targets' buffers. Raises NoGoodCopy, once all that can be had was."""

    def one(source: Source) -> str:
        target = targets[source.path]
        parts = [(box, part) for box in target.buffers if (part := intersect(source.box, box)) is not None]
        reasons = []
        for location in source.locations:
            try:
                data = fetch(location, source)
                if data.shape != lengths(source.box) or data.dtype != target.dtype:
                    raise SlotError(f"it came as {data.dtype}{list(data.shape)}")
            except (SlotError, OSError) as error:
                reasons.append(f"{location.holder}: {error}")
                rejected(source, location, str(error))
                continue
            if parts == [(source.box, source.box)]:
                target.buffers[source.box] = data
                return ""
            for box, part in parts:
                target.buffers[box][within(part, box)] = data[within(part, source.box)]
            return ""
        return f"{source.path} {text(source.box)}: " + ("; ".join(reasons) or "it has no location")

    needed = [
        source
        for source in choice.shards
        if any(intersect(source.box, box) is not None for box in targets[source.path].buffers)
    ]
    needed.sort(
        key=lambda source: -source.nbytes
    )  # the large ones first: then no thread ends much later than the others
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        failures = [failure for failure in pool.map(one, needed) if failure]
    if failures:
        raise NoGoodCopy(
            f"{len(failures)} of the {len(needed)} shards that this process needs of step {choice.step} cannot be had "
            f"anywhere:\n  {_first(failures)}"
        )


def _put(values: list[np.ndarray[Any, Any]], places: list[SingleDeviceSharding]) -> list[Any]:
    """The values on the devices or in their hosts' memory, in arrays that are theirs alone.

    On a CPU, `device_put` makes a window into numpy's memory where that is aligned, whatever `may_alias` says. Such an
    array cannot be donated in place, and one buffer may be behind several devices; a second put, from array to array,
    does copy.
    """
    arrays = jax.device_put(values, places)
    if jax.default_backend() == "cpu":
        arrays = jax.device_put(arrays, places, may_alias=False)
    return list(arrays)


def _first(lines: list[str]) -> str:
    return "\n  ".join(lines[:MOST_SHOWN]) + (
        f"\n  ... and {len(lines) - MOST_SHOWN} more" if lines[MOST_SHOWN:] else ""
    )
