"""A place for files outside of the run directory: what the durable tier asks of one, whatever it is.

Names are relative to the place's address, with `/` between their parts. A store keeps no state that matters and is safe
to use from threads. Read next: `local_store.py`, the plainest one; `guarded.py`, which makes any of them safe to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from jaxscale.config_error import ConfigError

PART_BYTES = 16 << 20
"""How much of a file is read, hashed and sent at once; smaller files go in one request."""

Chunks = Callable[[], Iterable[bytes]]
"""The content of a file from its begin, anew at each call: a write that failed is repeated. What it raises ends the
write, and nothing of the file exists then."""


class StoreError(ConfigError):
    """An address that cannot be used at all. The message says what, why, and how to fix it."""


class Conflict(RuntimeError):
    """A conditional write found something else than what it was conditional on. Nothing was written."""


class Versioned(NamedTuple):
    """The content of a file, and what tells it from every other content that the name had or will have."""

    data: bytes
    version: str


class Store(Protocol):
    """Raises FileNotFoundError for what is not there, OSError for what the place itself does."""

    address: str
    """For people and events; no secret is in it."""

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, files and folders; empty where there is no such folder."""
        ...

    def files(self, folder: str = "") -> dict[str, int]:
        """Every file below a folder, at any depth, by its name from there -> bytes."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """A file from `start` on, `size` bytes at most (None: to its end)."""
        ...

    def read_versioned(self, name: str) -> Versioned:
        """A small file, and its version for `replace`."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, there wholly or not at all, over whatever is there."""
        ...

    def write_chunks(self, name: str, chunks: Chunks, size: int) -> None:
        """As `write`, for a file of `size` bytes that may be larger than memory."""
        ...

    def copy(self, name: str, to: str, size: int) -> bool:
        """Makes a file of `size` bytes out of another one there. False where the place cannot, or has no such file."""
        ...

    def create(self, name: str, data: bytes) -> str:
        """Writes a file that must not be there. Returns its version. Raises Conflict."""
        ...

    def replace(self, name: str, data: bytes, version: str) -> str:
        """Writes over a file that must be as `read_versioned` said. Returns the new version. Raises Conflict."""
        ...

    def delete(self, name: str) -> None:
        """Deletes a file; none is there afterwards, whether one was or not."""
        ...
