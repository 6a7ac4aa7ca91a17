"""How a state lies in checkpoints, where that is not how it lies in the running program.

Every checkpoint, in memory and durable, has the model's own order and shapes. A run may keep its stacked layers in
another one (permuted over pipeline stages, padded to a multiple of them): its task says so by a pair of pure functions,
applied where a checkpoint is written or read and nowhere else, so that a checkpoint moves between any two layouts. Read
next: `../worker.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxscale import host_memory
from jaxscale.train.protocols import Record, Restore, Sinks, Snapshot

State = Mapping[str, Any]


@dataclass(frozen=True)
class StoredLayout:
    """Both functions take and return a state, or some of its entries (`{"params": ...}`), and can be traced.

    `restore(store(state))` has the bits of `state`, and `store(restore(stored))` those of `stored`.
    """

    store: Callable[[State], dict[str, Any]]
    """State of the program -> state of a checkpoint."""
    restore: Callable[[State], dict[str, Any]]
    """State of a checkpoint -> state of the program."""


def loaded(layout: StoredLayout | None, abstract: State, load: Callable[[State], dict[str, Any]]) -> dict[str, Any]:
    """What `load` reads, as the program has it. To be called in the program's mesh.

    `abstract`: nested dict of `jax.ShapeDtypeStruct` with shardings, as the program has it; `load` gets one as it is
    stored. None: the program's layout is the stored one.
    """
    if layout is None:
        return load(abstract)
    stored = host_memory.in_memory_of(abstract, jax.eval_shape(jax.jit(layout.store), abstract))
    restored: dict[str, Any] = jax.jit(layout.restore)(load(stored))
    return restored


def restoring(layout: StoredLayout | None, restore: Restore) -> Restore:
    """A `Restore` of the program's states from one of stored states."""

    def of_program(abstract: State) -> tuple[dict[str, Any], Record] | None:
        record: list[Record] = []

        def load(stored: State) -> dict[str, Any]:
            found = restore(stored)
            if found is None:
                raise _Nothing
            record.append(found[1])
            return found[0]

        try:
            return loaded(layout, abstract, load), record[0]
        except _Nothing:
            return None

    return of_program


def storing(layout: StoredLayout | None, sinks: Sinks) -> Sinks:
    """The same sinks, whose snapshots get states as they are stored."""
    return sinks if layout is None else replace(sinks, snapshot=_Storing(sinks.snapshot, layout))


class _Nothing(Exception):
    """There is no checkpoint."""


class _Storing:
    """A snapshot that hands states on as they are stored."""

    def __init__(self, snapshot: Snapshot, layout: StoredLayout) -> None:
        self._snapshot, self._store = snapshot, jax.jit(layout.store)

    def wants(self, step: int) -> bool:
        return self._snapshot.wants(step)

    def offer(self, step: int, state: State, record: Record, *, final: bool = False) -> None:
        self._snapshot.offer(step, self._store(state), record, final=final)

    def close(self) -> None:
        self._snapshot.close()
