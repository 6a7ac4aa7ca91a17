"""From the chosen shards to a state on this process's devices, whatever mesh wrote them and whatever mesh there is now.

Each source shard is fetched once at most, by a few threads; what turns out damaged comes from its next location. What a
device needs goes to it as soon as it is complete, so that the host holds little besides. Moves bytes only: nothing is
computed on a device, so nothing is compiled (but where slices left or joined: `by_slice.py`). Read next: `restore.py`,
the durable tier's way.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding, SingleDeviceSharding

from jaxscale import tree
from jaxscale.checkpoint.boxes import Box, box_of, intersect, lengths, text, uncovered, volume, within
from jaxscale.checkpoint.by_slice import as_stored, dealt
from jaxscale.checkpoint.compare import StateMismatch, describe, differences
from jaxscale.checkpoint.cover import Choice, Location, Source
from jaxscale.checkpoint.slot import SlotError, dtype_of

Piece = tuple[Box, np.ndarray[Any, Any]]
"""A part of a shard, and the part of the whole array that it is."""

Fetch = Callable[[Location, Source], np.ndarray[Any, Any] | Iterable[Piece]]
"""Gives a verified copy of a source shard from one of its locations: an array, which is the caller's from then on, or,
where it is large, pieces. Each of them may be written over when the next one is asked for, and only after the last one
are they known to be good. Called by several threads.

Raises SlotError or OSError, there or between the pieces, where that is not to be had there.
"""

Rejected = Callable[[Source, Location, str], None]
"""Told of each location that did not give what it should, with the reason. Called by several threads at a time."""

THREADS = 4
MOST_SHOWN = 20
HELD_SHARE, HELD_BYTES = 0.06, 32 << 20
"""How much of what this process needs, or how many bytes if that is more, may be held besides what the devices have."""


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
    placed = _Filling(targets, shardings, choice, fetch, rejected or (lambda *_: None)).run(threads)
    state = {}
    for path, leaf in leaves.items():
        parts = [placed[path, device] for device in targets[path].devices]
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
    missing: dict[Box, int] = field(default_factory=dict)
    """Box -> how many source shards it still lacks; what is on its devices is not there any more."""
    buffers: dict[Box, np.ndarray[Any, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, leaf: Any, sharding: Sharding) -> _Target:
        indices = sharding.addressable_devices_indices_map(leaf.shape)
        devices = {device: box_of(index or (), leaf.shape) for device, index in indices.items()}
        return cls(dtype_of(leaf.dtype.name), devices, dict.fromkeys(devices.values(), 0))

    def nbytes(self, box: Box) -> int:
        return volume(box) * self.dtype.itemsize

    def touched(self, box: Box) -> list[Box]:
        """Which of the boxes need a part of this one."""
        return [mine for mine in self.missing if intersect(box, mine) is not None]


def _check_covered(targets: Mapping[str, _Target], choice: Choice) -> None:
    held: dict[str, list[Box]] = {}
    for source in choice.shards:
        held.setdefault(source.path, []).append(source.box)
    for path, target in targets.items():
        for box in target.missing:
            if (gap := uncovered(box, held.get(path, ()))) is not None:
                raise NoGoodCopy(f"{path} {text(gap)} of step {choice.step} is in no slot; choose() would have refused")


class _Filling:
    """Fetches what is needed, and gives each box to its devices once it is complete."""

    def __init__(
        self,
        targets: Mapping[str, _Target],
        shardings: Mapping[str, Sharding],
        choice: Choice,
        fetch: Fetch,
        rejected: Rejected,
    ) -> None:
        self._targets, self._shardings, self._fetch, self._rejected = targets, shardings, fetch, rejected
        self._step = choice.step
        sizes = {path: sum(map(target.nbytes, target.missing)) for path, target in targets.items()}
        needed = [source for source in choice.shards if targets[source.path].touched(source.box)]
        # One array after the other, so that few are begun and not complete; the large ones first: then no thread ends
        # much later than the others.
        self._needed = sorted(needed, key=lambda source: (-sizes[source.path], source.path, source.box))
        self._most = max(HELD_BYTES, int(HELD_SHARE * sum(sizes.values())))
        self._held = 0
        self._complete: list[tuple[str, Box]] = []
        self._placed: dict[tuple[str, Any], jax.Array] = {}
        for source in needed:
            for box in targets[source.path].touched(source.box):
                targets[source.path].missing[box] += 1

    def run(self, threads: int) -> dict[tuple[str, Any], jax.Array]:
        """Path and device -> what it has. Raises NoGoodCopy, once all that can be had was."""
        for path, target in self._targets.items():  # what has no elements has no source
            for box in [box for box, count in target.missing.items() if not count]:
                self._begin(path, box)
                self._complete.append((path, box))
        done: queue.SimpleQueue[Future[tuple[Source, str]]] = queue.SimpleQueue()
        failures, next_one, running = [], 0, 0
        with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
            while running or next_one < len(self._needed):
                while next_one < len(self._needed) and self._has_room(self._needed[next_one], running):
                    pool.submit(self._one, self._needed[next_one]).add_done_callback(done.put)
                    next_one, running = next_one + 1, running + 1
                source, failure = done.get().result()
                running -= 1
                if failure:
                    failures.append(failure)
                else:
                    self._count(source)
                if sum(self._targets[path].nbytes(box) for path, box in self._complete) > self._most // 2:
                    self._place()
        self._place()
        if failures:
            raise NoGoodCopy(
                f"{len(failures)} of the {len(self._needed)} shards that this process needs of step {self._step} "
                f"cannot be had anywhere:\n  {_first(failures)}"
            )
        return self._placed

    def _has_room(self, source: Source, running: int) -> bool:
        """Whether it may be fetched now; if so, there is a buffer for each box that needs it."""
        target = self._targets[source.path]
        new = [box for box in target.touched(source.box) if box not in target.buffers]
        if running and new and self._held + sum(map(target.nbytes, new)) > self._most:
            return False
        for box in new:
            self._begin(source.path, box)
        return True

    def _begin(self, path: str, box: Box) -> None:
        target = self._targets[path]
        target.buffers[box] = np.empty(lengths(box), target.dtype)
        self._held += target.nbytes(box)

    def _one(self, source: Source) -> tuple[Source, str]:
        """Fetches one shard into the buffers. Returns why it is not to be had anywhere, or nothing."""
        reasons = []
        for location in source.locations:
            try:
                fetched = self._fetch(location, source)
                if isinstance(fetched, np.ndarray):
                    self._take(source, source.box, fetched, is_given=True)
                else:
                    for box, data in fetched:
                        self._take(source, box, data, is_given=False)
            except (SlotError, OSError) as error:
                reasons.append(f"{location.holder}: {error}")
                self._rejected(source, location, str(error))
                continue
            return source, ""
        return source, f"{source.path} {text(source.box)}: " + ("; ".join(reasons) or "it has no location")

    def _take(self, source: Source, box: Box, data: np.ndarray[Any, Any], is_given: bool) -> None:
        target = self._targets[source.path]
        if data.shape != lengths(box) or data.dtype != target.dtype:
            raise SlotError(f"it came as {data.dtype}{list(data.shape)}")
        parts = [(mine, part) for mine in target.touched(source.box) if (part := intersect(box, mine)) is not None]
        if is_given and parts == [(source.box, source.box)]:
            target.buffers[source.box] = data
            return
        for mine, part in parts:
            target.buffers[mine][within(part, mine)] = data[within(part, box)]

    def _count(self, source: Source) -> None:
        target = self._targets[source.path]
        for box in target.touched(source.box):
            target.missing[box] -= 1
            if not target.missing[box]:
                self._complete.append((source.path, box))

    def _place(self) -> None:
        """What is complete goes to its devices, in as few calls as can be."""
        values, places, keys = [], [], []
        for path, box in self._complete:
            target = self._targets[path]
            for device in (device for device, its in target.devices.items() if its == box):
                values.append(target.buffers[box])
                places.append(SingleDeviceSharding(device, memory_kind=self._shardings[path].memory_kind))
                keys.append((path, device))
        self._placed |= dict(zip(keys, jax.block_until_ready(_put(values, places)), strict=True))
        for path, box in self._complete:
            del self._targets[path].buffers[box], self._targets[path].missing[box]
            self._held -= self._targets[path].nbytes(box)
        self._complete = []


def _put(values: list[np.ndarray[Any, Any]], places: list[SingleDeviceSharding]) -> list[jax.Array]:
    """The values on the devices or in their hosts' memory, in arrays that are theirs alone.

    On a CPU, `device_put` makes a window into numpy's memory where that is aligned, whatever `may_alias` says. Such an
    array cannot be donated in place, and one buffer may be behind several devices; a second put, from array to array,
    does copy.
    """
    arrays = list(jax.device_put(values, places))
    if jax.default_backend() == "cpu":
        pairs = enumerate(zip(arrays, values, strict=True))
        windows = [n for n, (array, value) in pairs if array.unsafe_buffer_pointer() == value.ctypes.data]
        copies = jax.device_put([arrays[n] for n in windows], [places[n] for n in windows], may_alias=False)
        for n, copy in zip(windows, copies, strict=True):
            arrays[n] = copy
    return arrays


def _first(lines: list[str]) -> str:
    return "\n  ".join(lines[:MOST_SHOWN]) + (
        f"\n  ... and {len(lines) - MOST_SHOWN} more" if lines[MOST_SHOWN:] else ""
    )
