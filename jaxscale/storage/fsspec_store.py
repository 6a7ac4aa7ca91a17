"""Any other address that fsspec opens: `gs://`, `sftp://`, `hdfs://`, `memory://`, ...

fsspec knows no conditional write that all of its places have. One is emulated: look, write, wait, look whether one's
own bytes are still there. Two jobs that write at the same moment may both believe for a second that they were first;
the next look of the one that lost tells it. That is said once in the log. Where ownership has to be exact, use S3 or a
folder. Read next: `s3_store.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import time
from typing import Any

from jaxscale.storage.store import Chunks, Conflict, StoreError, Versioned

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 0.5
"""Between an emulated conditional write and the look whether another one came later."""
PARTIAL = ".partial"


class FsspecStore:
    """Raises StoreError for an address that fsspec cannot open, and names the package that is missing."""

    def __init__(self, address: str) -> None:
        import fsspec  # type: ignore[import-untyped]  # no stubs

        self.address = address.rstrip("/")
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.address)
        except ImportError as error:
            scheme = address.partition("://")[0]
            raise StoreError(
                f"{address} needs a package more: {error} (pip install 'fsspec[{scheme}]' where fsspec has it)"
            ) from error
        except ValueError as error:
            raise StoreError(f"{address} is no address that fsspec opens: {error}") from error
        self._is_told = False

    def names(self, folder: str = "") -> list[str]:
        top = self._path(folder)
        try:
            found = self._system.ls(top, detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        return sorted(name for name in names - {""} if not name.endswith(PARTIAL))

    def files(self, folder: str = "") -> dict[str, int]:
        top = self._path(folder)
        self._system.invalidate_cache()
        try:
            found: dict[str, Any] = self._system.find(top, detail=True)
        except FileNotFoundError:
            return {}
        cut = len(top.rstrip("/")) + 1
        return {name[cut:]: int(one["size"]) for name, one in found.items() if not name.endswith(PARTIAL)}

    def size(self, name: str) -> int:
        self._system.invalidate_cache()
        return int(self._system.info(self._path(name))["size"])

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        end = None if size is None else start + size
        data: bytes = self._system.cat_file(self._path(name), start=start or None, end=end)
        return data

    def read_versioned(self, name: str) -> Versioned:
        data = self.read(name)
        return Versioned(data, _version(data))

    def write(self, name: str, data: bytes) -> None:
        self.write_chunks(name, lambda: [data], len(data))

    def write_chunks(self, name: str, chunks: Chunks, size: int) -> None:  # noqa: ARG002 - the end says how long it is
        path = self._path(name)
        partial = f"{path}.{secrets.token_hex(4)}{PARTIAL}"
        self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            with self._system.open(partial, "wb") as file:
                for chunk in chunks():
                    file.write(chunk)
            self._system.mv(partial, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._system.rm_file(partial)
            raise

    def copy(self, name: str, to: str, size: int) -> bool:  # noqa: ARG002 - of most places fsspec copies by reading and writing
        return False

    def create(self, name: str, data: bytes) -> str:
        if self._system.exists(self._path(name)):
            raise Conflict(f"{self.address}/{name} is there already")
        return self._write_and_look(name, data)

    def replace(self, name: str, data: bytes, version: str) -> str:
        try:
            found = self.read_versioned(name).version
        except FileNotFoundError:
            raise Conflict(f"{self.address}/{name} is gone") from None
        if found != version:
            raise Conflict(f"{self.address}/{name} was written by somebody else")
        return self._write_and_look(name, data)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    def _write_and_look(self, name: str, data: bytes) -> str:
        if not self._is_told:
            logger.warning("%s has no conditional writes: who owns the run is known there after a moment", self.address)
            self._is_told = True
        self.write(name, data)
        time.sleep(SETTLE_SECONDS)
        if self.read(name) != data:
            raise Conflict(f"{self.address}/{name} was written by somebody else")
        return _version(data)

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self._root.rstrip("/"), name) if part)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
