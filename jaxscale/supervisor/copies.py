"""Copies of peers' memory slots: when one may be written, and how it comes to exist. No sockets here.

A copy is received into `.incoming-N` beside its place and takes its name `gen-N` by a rename, once all its digests have
been checked and while its sender is not fenced. So a file named `gen-N` was whole when it got that name. The file that
held the generation before becomes the `.incoming-N`: the owner has given that generation up by overwriting its own slot
(the retention rule), memory is never needed twice, and its pages are there already. Read next: `peer_server.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from jaxscale.supervisor.peers import Announcement, Code, Refused
from jaxscale.supervisor.slot_files import COPIES, SLOT_NAME, check_host, copy_slot

INCOMING = ".incoming-"
SMALLEST = 4096
"""Bytes of a slot's header: a smaller file is none."""


class Verified(Protocol):
    """What is known of a slot whose digests are right; `checkpoint.slot_format.SlotTable` is one."""

    @property
    def host(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def step(self) -> int: ...


Verify = Callable[[Path, str], Verified]
"""`checkpoint.slot.verify`: checks all digests of a slot of this job. Raises where anything is wrong."""


@dataclass(frozen=True, order=True)
class Held:
    """The state that a checked copy holds; a later epoch's is newer whatever its step."""

    epoch: int
    step: int


class CopyStore:
    """The copies below `folder`. Safe to use from several threads."""

    def __init__(self, folder: Path, job: str, verify: Verify, generations: int = 2) -> None:
        """Deletes what a killed agent left half received. Copies that are there are checked before they count."""
        self._folder, self._job, self._verify, self._generations = folder, job, verify, generations
        self._lock = threading.Lock()
        self._minimum_epoch = 0
        self._held: dict[tuple[str, int], Held] = {}
        self._busy: set[tuple[str, int]] = set()
        for left in folder.glob(f"{COPIES}/*/{INCOMING}*"):
            left.unlink(missing_ok=True)

    def fence(self, minimum_epoch: int) -> None:
        """From its return on no copy comes to exist whose sender lives in a lower epoch. Never goes back."""
        with self._lock:
            self._minimum_epoch = max(self._minimum_epoch, minimum_epoch)

    def held(self) -> dict[tuple[str, int], Held]:
        """(owner, generation) -> what its copy holds, of all copies that were checked."""
        with self._lock:
            return dict(self._held)

    def adopt(self) -> list[str]:
        """Checks the copies that an earlier agent left. Returns a line for each that is not good; it stays, unused."""
        found = []
        for path in sorted(self._folder.glob(f"{COPIES}/*/gen-*")):
            name = SLOT_NAME.fullmatch(path.name)
            if name is None or (path.parent.name, int(name[1])) in self.held():
                continue
            try:
                self._look(path.parent.name, int(name[1]))
            except Refused as error:
                found.append(f"{COPIES}/{path.parent.name}/{path.name}: {error.reason}")
        return found

    def begin(self, announced: Announcement) -> Incoming | Held:
        """A place to receive the slot into, or what is held where that is the same state already. Raises Refused.

        A held copy of the same state is checked again, so that a push repairs one that was damaged in memory.
        """
        key = (check_host(announced.owner), announced.generation)
        if announced.generation >= self._generations:
            raise Refused(
                Code.MALFORMED,
                f"there is no generation {announced.generation} here: generations are {self._generations}",
            )
        if announced.nbytes < SMALLEST:
            raise Refused(
                Code.MALFORMED, f"a slot of {announced.nbytes} bytes is none: the header alone has {SMALLEST} bytes"
            )
        with self._lock:
            self._check_epoch(announced)
            if key in self._busy:
                raise Refused(
                    Code.BUSY, f"another push of {_name(announced)} is under way here; try again when it has ended"
                )
            self._busy.add(key)
        try:
            held = self._current(*key)
            announces = Held(announced.epoch, announced.step)
            if held is not None and held > announces:
                raise Refused(
                    Code.OUTDATED,
                    f"step {announced.step} of epoch {announced.epoch} is older than what is held as "
                    f"{_name(announced)}: step {held.step} of epoch {held.epoch}",
                )
            if held == announces:
                self._release(key)
                return held
            return Incoming(self, announced, self._open(announced))
        except BaseException:
            self._release(key)
            raise

    def _check_epoch(self, announced: Announcement) -> None:
        if announced.sender_epoch < self._minimum_epoch:
            raise Refused(
                Code.OUTDATED,
                f"the sender lives in epoch {announced.sender_epoch}; all below {self._minimum_epoch} are fenced here",
            )

    def _current(self, owner: str, generation: int) -> Held | None:
        try:
            return self._look(owner, generation)
        except Refused:
            return None  # damaged, or not there: what comes can only be better

    def _look(self, owner: str, generation: int) -> Held:
        path = self._folder / copy_slot(owner, generation)
        with self._lock:
            self._held.pop((owner, generation), None)
        held = self._checked(path, owner)
        with self._lock:
            self._held[owner, generation] = held
        return held

    def _checked(self, path: Path, owner: str) -> Held:
        if path.is_symlink() or not path.is_file():
            raise Refused(Code.MISSING, "it is not there, or no plain file")
        try:
            table = self._verify(path, self._job)
        except Exception as error:  # whatever a verifier finds in foreign bytes, the answer is the same
            raise Refused(Code.DAMAGED, f"{error}" or type(error).__name__) from error
        if table.host != owner:
            raise Refused(Code.DAMAGED, f"the slot was written by host {table.host!a}, not by {owner!a}")
        return Held(table.epoch, table.step)

    def _open(self, announced: Announcement) -> int:
        """Turns the generation's file, if there is one, into the incoming one. Raises Refused where memory is short."""
        final = self._folder / copy_slot(announced.owner, announced.generation)
        incoming = _incoming(final)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.is_file() and not final.is_symlink():
                _check_room(final, announced, final.stat().st_blocks * 512)
                with self._lock:
                    self._held.pop((announced.owner, announced.generation), None)
                os.replace(final, incoming)
            else:
                _check_room(final.parent, announced, 0)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(incoming, flags, 0o600)
        except OSError as error:
            raise _cannot_hold(announced, error) from error
        try:
            if os.fstat(descriptor).st_size > announced.nbytes:
                os.ftruncate(descriptor, announced.nbytes)
        except OSError as error:
            os.close(descriptor)
            incoming.unlink(missing_ok=True)
            raise _cannot_hold(announced, error) from error
        return descriptor

    def _seal(self, announced: Announcement) -> Held:
        final = self._folder / copy_slot(announced.owner, announced.generation)
        held = self._checked(_incoming(final), announced.owner)
        if held != Held(announced.epoch, announced.step):
            raise Refused(
                Code.DAMAGED,
                f"the slot holds step {held.step} of epoch {held.epoch}, announced was step {announced.step} of epoch "
                f"{announced.epoch}: its worker went on to write it meanwhile",
            )
        with self._lock:
            self._check_epoch(announced)
            os.replace(_incoming(final), final)
            self._held[announced.owner, announced.generation] = held
        return held

    def _abandon(self, announced: Announcement) -> None:
        _incoming(self._folder / copy_slot(announced.owner, announced.generation)).unlink(missing_ok=True)

    def _release(self, key: tuple[str, int]) -> None:
        with self._lock:
            self._busy.discard(key)


class Incoming:
    """A copy that is being received. Used with `with`; unless it was sealed, nothing of it is left afterwards."""

    def __init__(self, store: CopyStore, announced: Announcement, descriptor: int) -> None:
        self.announced = announced
        self.descriptor = descriptor
        self._store = store
        self._sealed = False

    def refusal(self, error: OSError) -> Refused:
        """What to answer where the file could not be written."""
        return _cannot_hold(self.announced, error)

    def seal(self) -> Held:
        """Checks all digests and gives the copy its name. Raises Refused."""
        held = self._store._seal(self.announced)
        self._sealed = True
        return held

    def __enter__(self) -> Incoming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.close(self.descriptor)
            if not self._sealed:
                with contextlib.suppress(OSError):  # the folder is gone: so is the file
                    self._store._abandon(self.announced)
        finally:
            self._store._release((self.announced.owner, self.announced.generation))


def _incoming(final: Path) -> Path:
    return final.with_name(INCOMING + final.name.removeprefix("gen-"))


def _name(announced: Announcement) -> str:
    return copy_slot(announced.owner, announced.generation)


def _check_room(place: Path, announced: Announcement, reused: int) -> None:
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    if announced.nbytes - reused > free:
        raise Refused(
            Code.NO_MEMORY,
            f"no memory for {_name(announced)}: it needs {(announced.nbytes - reused) / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are free; give the hosts a larger /dev/shm, or lower memory.replicas",
        )


def _cannot_hold(announced: Announcement, error: OSError) -> Refused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        return Refused(
            Code.NO_MEMORY,
            f"no memory for {_name(announced)} of {announced.nbytes / 1e6:.1f} MB: it became full meanwhile; "
            "give the hosts a larger /dev/shm, or lower memory.replicas",
        )
    return Refused(Code.DAMAGED, f"{_name(announced)} cannot be written here: {error.strerror}")
