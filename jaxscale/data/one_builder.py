"""One builder of a folder at a time, and a refused build leaves nothing behind. Read next: `build.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxscale.data.errors import DataError

PLACES = "data.cache or the variable JAXSCALE_CACHE, --out of `jaxscale data build`"


@contextmanager
def exclusive(out: Path, wait: bool) -> Iterator[None]:
    """One builder of a folder at a time. The kernel frees the lock of a killed process."""
    import filelock

    path = out.with_name(f".{out.name}.lock")
    lock = filelock.FileLock(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise DataError(
            f"another process is building {out} right now; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        _remove_empty(missing)
        raise DataError(
            f"token files cannot be built in {out.parent}: {error.strerror or error}; choose a folder that can be "
            f"written ({PLACES})"
        ) from error
    try:
        yield
    except DataError:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone, and makes a new one
        _remove_empty(missing)
        raise
    finally:
        lock.release()


def _remove_empty(folders: Sequence[Path]) -> None:
    """Takes back the folders that a refused build made, the deepest first, up to one that others use by now."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()
