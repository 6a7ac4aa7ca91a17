"""The memory tier of one worker: every k steps its shards are copied into shared memory, where they outlive it.

Training waits for the copy alone; digests and sealing follow in a thread. A sealed slot is a promise to the other hosts
of the world, so it is overwritten only when the coordinator has decided about its step. Read next: `assemble.py`, the
way back.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxscale import tree
from jaxscale.checkpoint.boxes import Box, box_of
from jaxscale.checkpoint.slot import ArrayInfo, SlotError, SlotWriter, read_slot
from jaxscale.train.protocols import Record

Verdicts = Callable[[], tuple[int, int]]
"""The newest committed step, and the step through which all are decided (committed or dropped)."""

Cadence = Callable[[], tuple[int, int]]
"""From which step on a snapshot is due every how many steps; 0 steps: as before."""

Notify = Callable[[str, dict[str, Any]], None]
"""`notify("slot_sealed" or "slot_skipped", fields)`; the former comes from the thread that seals."""

Sealed = tuple[int, int]
"""(step, epoch) of the snapshot that a slot file holds."""

FINAL_SECONDS = 10.0
POLL_SECONDS = 0.005


class MemorySnapshots:
    """The `Snapshot` of a supervised worker: `generations` slot files in `folder`, written in turn.

    What earlier epochs left in these files counts as promised too. Failures of the thread are raised by the next call.
    """

    def __init__(
        self,
        folder: Path,
        *,
        job: str,
        host: str,
        rank: int,
        epoch: int,
        every: int,
        generations: int,
        verdicts: Verdicts,
        notify: Notify,
        cadence: Cadence = lambda: (-1, 0),
        also: int = 0,
        kept: Callable[[], int] = lambda: -1,
        final_seconds: float = FINAL_SECONDS,
    ) -> None:
        """`every`: steps between snapshots, 0 for none but the last one. Touches nothing before the first `offer`.

        `also`: every so many steps there is one whatever the cadence, because that step is to be made durable.
        `kept`: the step that is being made durable just now; its slot is not written over, but by the last snapshot.

        `cadence` is looked at after each step and may change `every`, at a step that is the same for all workers.

        `verdicts` says from the start that the step which this epoch was restored from is committed, if slots held it.
        `final_seconds`: how long the last snapshot waits for a verdict that frees a slot.
        """
        self._folder, self._job, self._host, self._rank, self._epoch = folder, job, host, rank, epoch
        self._every, self._verdicts, self._notify, self._final_seconds = every, verdicts, notify, final_seconds
        self._cadence, self._since, self._answer = cadence, 0, (-1, False)
        self._also, self._kept = also, kept
        self._files = [folder / f"gen-{generation}" for generation in range(generations)]
        self._writers: list[SlotWriter | None] = [None] * generations
        self._held: list[Sealed | None] | None = None
        self._layout: _Layout | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._telling = threading.Lock()
        self._is_sealing = False
        self._late: list[tuple[int, str]] = []
        """Steps skipped while an older one is being sealed: told after it, since reports come in the order of steps."""

    def wants(self, step: int) -> bool:
        """Whether a snapshot is due after this step; the same answer however often it is asked."""
        if self._every <= 0:
            return False
        if step != self._answer[0]:
            since, every = self._cadence()
            if every > 0 and step >= since:
                self._since, self._every = max(0, since), every
            is_durable = self._also > 0 and step % self._also == 0
            self._answer = step, is_durable or (step - self._since) % self._every == 0
        return self._answer[1]

    def offer(self, step: int, state: Mapping[str, Any], record: Record, *, final: bool = False) -> None:
        """Copies this process's unique shards of the state after `step` updates; they may be donated right after.

        `state`: nested dict of `jax.Array` with any shardings. The first offer allocates the memory. A step is skipped,
        with a notice, while the snapshot before it is still being sealed or no slot may be overwritten; `final` waits
        for both, and returns when the step is sealed. Raises SlotError where there is no memory, where a slot could not
        be sealed, or where `final` waited in vain.
        """
        if record.step != step:
            raise ValueError(f"the record of step {record.step} was offered with the state of step {step}")
        if not (final or self.wants(step)):
            return
        if final:
            self._wait()
        self._raise_failure()
        with self._telling:
            if self._is_sealing:
                self._late.append((step, "the snapshot before it is still being sealed"))
                return
        jax.block_until_ready(state)
        started = time.monotonic()
        held = self._look()
        committed, decided = self._verdicts()
        if step <= committed or (step, self._epoch) in held:
            return  # it is safe already
        generation = free_generation(held, self._epoch, committed, decided, -1 if final else self._kept())
        if generation is None and final:
            generation = self._wait_for_generation(step, held)
        if generation is None:
            self._skip(step, f"no slot may be overwritten: {self._promises(held)}; decided is step {decided}")
            return
        writer, shards = self._prepare(state, generation, committed, decided)
        held[generation] = None
        writer.begin(self._epoch, step)
        _copy(writer, shards)
        blocked = time.monotonic() - started
        self._is_sealing = True
        self._thread = threading.Thread(
            target=self._seal, args=(generation, writer, record, started, blocked), name=f"seal-{step}", daemon=True
        )
        self._thread.start()
        if final:
            self._wait()
            self._raise_failure()

    def close(self) -> None:
        """Waits for the snapshot under way and lets go of the files, which stay. Raises what failed in the thread."""
        self._wait()
        for writer in self._writers:
            if writer is not None:
                writer.close()
        self._writers = [None] * len(self._files)
        self._raise_failure()

    def _look(self) -> list[Sealed | None]:
        """What the slot files hold. They are read once, then known: nobody else writes them."""
        if self._held is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held = [_held(file, self._job) for file in self._files]
        return self._held

    def _prepare(
        self, state: Mapping[str, Any], generation: int, committed: int, decided: int
    ) -> tuple[SlotWriter, list[Any]]:
        """The writer for a generation, and the shards that go into it, in its order."""
        layout, shards = _unique_shards(state)
        if layout != self._layout:
            for writer in self._writers:
                if writer is not None:
                    writer.close()
            self._writers = [None] * len(self._files)
            self._layout = layout
            # All that are free get their memory now: it is missed at the first snapshot or never.
            for other in range(len(self._files)):
                if is_free(self._look(), other, self._epoch, committed, decided):
                    self._open(other, layout)
        return self._writers[generation] or self._open(generation, layout), shards

    def _open(self, generation: int, layout: _Layout) -> SlotWriter:
        assert self._held is not None
        self._held[generation] = None  # resizing the file voids what it held
        writer = SlotWriter(self._files[generation], self._job, self._host, self._rank, layout.arrays, layout.shards)
        self._writers[generation] = writer
        return writer

    def _seal(self, generation: int, writer: SlotWriter, record: Record, started: float, blocked: float) -> None:
        try:
            table = writer.seal({field.name: getattr(record, field.name) for field in dataclasses.fields(record)})
            assert self._held is not None
            self._held[generation] = (table.step, table.epoch)
            self._notify(
                "slot_sealed",
                {
                    "step": table.step,
                    "file": writer.path.name,
                    "bytes": table.nbytes,
                    "seconds": round(time.monotonic() - started, 6),
                    "blocked_seconds": round(blocked, 6),
                },
            )
        except BaseException as error:  # whatever it is, the training thread is told
            self._failure = error
        finally:
            with self._telling:
                for step, reason in self._late:
                    self._skip(step, reason)
                self._late, self._is_sealing = [], False

    def _wait_for_generation(self, step: int, held: Sequence[Sealed | None]) -> int:
        """Waits until the coordinator has decided about one of the slots. Raises SlotError when it does not in time."""
        deadline = time.monotonic() + self._final_seconds
        while (generation := free_generation(held, self._epoch, *self._verdicts())) is None:
            if time.monotonic() > deadline:
                raise SlotError(
                    f"the last state, of step {step}, found no slot within {self._final_seconds:g} s: "
                    f"{self._promises(held)}, and the coordinator, which has decided about steps up to "
                    f"{self._verdicts()[1]} only, is silent"
                )
            time.sleep(POLL_SECONDS)
        return generation

    def _skip(self, step: int, reason: str) -> None:
        self._notify("slot_skipped", {"step": step, "reason": reason})

    def _promises(self, held: Sequence[Sealed | None]) -> str:
        return ", ".join(f"{f.name} holds step {h[0]}" for f, h in zip(self._files, held, strict=True) if h is not None)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a slot holds, whatever the values are."""

    arrays: dict[str, ArrayInfo]
    shards: list[tuple[str, Box]]


def is_free(
    held: Sequence[Sealed | None], generation: int, epoch: int, committed: int, decided: int, kept: int = -1
) -> bool:
    """Whether a worker of `epoch` may overwrite a slot. Pure. `kept`: the step that is being made durable.

    The newest committed step stays; of two slots with it the one of the later epoch, or a host could be left without a
    slot to write. Steps of this epoch stay until they are decided; those of earlier ones were, when this one formed.
    What a later epoch wrote is not for a worker that was fenced.
    """
    slot = held[generation]
    if slot is None:
        return True
    step, writer = slot
    if writer > epoch or step == kept:
        return False
    if step == committed:
        return slot != max(other for other in held if other is not None and other[0] == committed)
    return writer < epoch or step <= decided


def free_generation(
    held: Sequence[Sealed | None], epoch: int, committed: int, decided: int, kept: int = -1
) -> int | None:
    """The slot to write next: a void one, else the oldest that may be overwritten, else None. Pure."""
    free = [index for index in range(len(held)) if is_free(held, index, epoch, committed, decided, kept)]
    return min(free, key=lambda index: held[index] or (-1, -1), default=None)


def _held(file: Path, job: str) -> Sealed | None:
    try:
        table = read_slot(file, job)
    except SlotError:
        return None
    return table.step, table.epoch


def _unique_shards(state: Mapping[str, Any]) -> tuple[_Layout, list[Any]]:
    """The shards of a state that this process is the first to hold, and where they belong."""
    arrays: dict[str, ArrayInfo] = {}
    places: list[tuple[str, Box]] = []
    shards = []
    for path, leaf in tree.flatten(state).items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{path} of the state is a {type(leaf).__name__}; a state holds jax arrays only")
        arrays[path] = ArrayInfo(leaf.shape, leaf.dtype.name)
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                places.append((path, box_of(shard.index, leaf.shape)))
                shards.append(shard)
    return _Layout(arrays, places), shards


def _copy(writer: SlotWriter, shards: Sequence[Any]) -> None:
    """Copies the shards' bytes. Keeps no view of any: an array that something else looks at cannot be donated in place.

    Bytes, because numpy copies bfloat16 and its like element by element in some versions.
    """
    for shard in shards:
        if shard.device.platform != "cpu":
            shard.data.copy_to_host_async()
    for index, shard in enumerate(shards):
        source = np.ascontiguousarray(shard.data).reshape(-1).view(np.uint8)
        np.copyto(writer.view(index).reshape(-1).view(np.uint8), source)
        del source
