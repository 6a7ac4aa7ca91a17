"""A store that cannot hurt whoever asks it: deadlines, retries with growing pauses, a circuit breaker, news of it.

Read next: `../retry.py`, whose figures are used; `deadline.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxscale.retry import Change, Retry, RetryConfig, is_transient
from jaxscale.storage.deadline import Deadline
from jaxscale.storage.store import PART_BYTES, Chunks, Store, Versioned

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""No wait of a minute makes room; whoever copies comes again later by itself."""


@dataclass(frozen=True)
class Bounds:
    """Of the calls to a store."""

    attempt_seconds: float = 20.0
    """For one attempt that moves few bytes."""
    bytes_per_second: float = 1e6
    """A transfer that is slower counts as hung."""
    call_seconds: float = 60.0
    """For a call with all its attempts and pauses: then it is given up."""


class GuardedStore:
    """Another store, with bounds. Raises what that one raises, LateAnswer, and BreakerOpen of `retry.py`."""

    def __init__(
        self,
        store: Store,
        bounds: Bounds | None = None,
        changed: Callable[[Change], None] | None = None,
        retry: RetryConfig | None = None,
        **clock: Any,
    ) -> None:
        """`changed` is told of each change of the breaker. `clock`: that of `Retry`, for tests."""
        self.address = store.address
        self._store, self._bounds = store, bounds or Bounds()
        self._retry = Retry(store.address, retry, changed, transient=may_pass, **clock)
        self._deadline = Deadline(store.address)

    def names(self, folder: str = "") -> list[str]:
        return self._call(lambda: self._store.names(folder))

    def files(self, folder: str = "") -> dict[str, int]:
        return self._call(lambda: self._store.files(folder))

    def size(self, name: str) -> int:
        return self._call(lambda: self._store.size(name))

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        return self._call(lambda: self._store.read(name, start, size), size or PART_BYTES)

    def read_versioned(self, name: str) -> Versioned:
        return self._call(lambda: self._store.read_versioned(name))

    def write(self, name: str, data: bytes) -> None:
        self._call(lambda: self._store.write(name, data), len(data))

    def write_chunks(self, name: str, chunks: Chunks, size: int) -> None:
        self._call(lambda: self._store.write_chunks(name, chunks, size), size)

    def copy(self, name: str, to: str, size: int) -> bool:
        return self._call(lambda: self._store.copy(name, to, size), size)

    def create(self, name: str, data: bytes) -> str:
        return self._call(lambda: self._store.create(name, data))

    def replace(self, name: str, data: bytes, version: str) -> str:
        return self._call(lambda: self._store.replace(name, data, version))

    def delete(self, name: str) -> None:
        self._call(lambda: self._store.delete(name))

    def _call[T](self, ask: Callable[[], T], size: int = 0) -> T:
        more = size / self._bounds.bytes_per_second
        seconds = self._bounds.attempt_seconds + more
        attempt: Callable[[], T] = lambda: self._deadline.call(ask, seconds)  # noqa: E731 - typed
        return self._retry.call(attempt, seconds=self._bounds.call_seconds + more)


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may end otherwise: not on a full or read-only disk, not where the request is wrong."""
    return is_transient(error) and not (isinstance(error, OSError) and error.errno in FULL)
