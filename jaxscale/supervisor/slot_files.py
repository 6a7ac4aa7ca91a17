"""Names of memory-slot files below an agent's folder, and how to open what a peer has named.

There are `own/gen-N`, written by this host's worker, and `copies/HOST/gen-N`, copies of peers' slots. A name that comes
from the network is never joined to a path before it has been checked, and no link is followed on the way to the file.
Read next: `copies.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from jaxscale.supervisor.peers import Code, Refused

OWN = "own"
COPIES = "copies"
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SLOT_NAME = re.compile(r"gen-(0|[1-9][0-9]{0,3})")
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC


def own_slot(generation: int) -> str:
    """Name of a slot that this host's worker writes."""
    return f"{OWN}/gen-{generation}"


def copy_slot(owner: str, generation: int) -> str:
    """Name of the copy of a peer's slot."""
    return f"{COPIES}/{owner}/gen-{generation}"


def check_host(name: str) -> str:
    """Raises Refused where the name cannot be that of a host (and of a folder)."""
    if not HOST_NAME.fullmatch(name):
        raise Refused(
            Code.MALFORMED,
            f"{name[:80]!a} is no host's name: 1 to 64 letters, digits, '.', '-', '_', a letter or digit first",
        )
    return name


def parts_of(name: str) -> tuple[str, ...]:
    """The folders and the file that a slot's name consists of. Pure. Raises Refused for any other name."""
    parts = tuple(name.split("/")) if len(name) <= 256 else ()
    own = len(parts) == 2 and parts[0] == OWN
    copy = len(parts) == 3 and parts[0] == COPIES and HOST_NAME.fullmatch(parts[1]) is not None
    if not (own or copy) or not SLOT_NAME.fullmatch(parts[-1]):
        raise Refused(
            Code.MALFORMED, f"{name[:80]!a} is no slot: the names are {OWN}/gen-N and {COPIES}/HOST/gen-N, nothing else"
        )
    return parts


@contextlib.contextmanager
def opened_slot(folder: Path, name: str) -> Iterator[tuple[int, int]]:
    """Opens a slot for reading: descriptor and size. Raises Refused where there is none, or no plain file."""
    parts = parts_of(name)
    with contextlib.ExitStack() as stack:
        try:
            place = _keep(stack, os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            for part in parts[:-1]:
                place = _keep(stack, os.open(part, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=place))
            # without O_NONBLOCK a pipe of that name would hold this thread for ever
            descriptor = _keep(stack, os.open(parts[-1], os.O_RDONLY | os.O_NONBLOCK | _SAFE, dir_fd=place))
        except OSError as error:
            raise Refused(Code.MISSING, f"there is no slot {name} here ({error.strerror})") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(Code.MISSING, f"there is no slot {name} here (that is no plain file)")
        yield descriptor, status.st_size


def _keep(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor
