"""From an address to its store. Read next: `store.py`, what each of them can do."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from jaxscale.storage.local_store import LocalStore
from jaxscale.storage.store import Store, StoreError


def open_store(address: str) -> Store:
    """`s3://bucket/prefix`, `gs://bucket/prefix`, `file:///folder`, a path, or another address that fsspec opens.

    Raises StoreError where a package is missing or the address is none. Asks nothing of the place yet.
    """
    scheme, is_remote, rest = address.partition("://")
    if not is_remote:
        return LocalStore(Path(address).expanduser())
    match scheme:
        case "file":
            if not rest.startswith("/"):
                raise StoreError(f"{address} is no address of a folder; write file:///folder, or the path alone")
            return LocalStore(Path(unquote(rest)))
        case "s3":
            from jaxscale.storage.s3_store import S3Store

            return S3Store(address)
        case _:
            from jaxscale.storage.fsspec_store import FsspecStore

            return FsspecStore(address)
