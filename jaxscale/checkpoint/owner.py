"""Who a run belongs to: one record at each place where steps of it come to exist, taken by conditional write.

`owner.json` holds the owner's job and a generation that grows with each take-over; the owner writes it again every few
seconds, and once more just before a step is committed. Whoever finds another record than its own there has lost the
run, whatever it believes: an old cluster that comes back after a partition commits nothing. Read next: `location.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxscale.config_error import ConfigError
from jaxscale.storage.store import Conflict, Store, Versioned
from jaxscale.supervisor.process_stat import STARTED, living_stat_of

OWNER = "owner.json"
LEASE_SECONDS = 20.0
"""An owner elsewhere that has not written for so long is taken for gone."""
LOOK_SECONDS = 0.5
SURE_SECONDS = 2.0
"""After a look at the record nobody else can have taken the place for longer than this: a lease is longer."""


class RunOwned(ConfigError):
    """Another job that is alive has this run."""


class OwnershipLost(PermissionError):
    """Another job has taken the run over, or another process of this one. This process may save nothing of it any more.

    `job`: whose it is now; empty where that cannot be known.
    """

    job = ""


@dataclass(frozen=True)
class Owner:
    """What `owner.json` says."""

    run: str
    """The recipe's name."""
    job: str
    generation: int
    host: str
    pid: int
    process: str
    """Names the process on its machine for good: boot, namespace of pids, pid, start."""
    time: float
    """When this was written, seconds since 1970."""
    released: bool = False
    """The owner ended in good order."""
    nonce: str = ""
    """Tells one's own write that was thought lost from another's."""

    def text(self) -> str:
        return f"job {self.job}, generation {self.generation}, pid {self.pid} on {self.host}"

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"


def this_process(run: str, job: str) -> Owner:
    """This process as an owner of generation 0."""
    pid = os.getpid()
    return Owner(run, job, 0, socket.gethostname(), pid, _identity(pid), time.time())


class Ownership:
    """Of one place."""

    def __init__(self, store: Store, me: Owner) -> None:
        self._store, self._me = store, me
        self._lock = threading.Lock()
        self._held: Versioned | None = None
        self._lost: OwnershipLost | None = None
        self._seen = float("-inf")
        """When this found its own record there, by the monotonic clock; before the question, not after the answer."""
        self.is_new = False
        """Whether nobody had this place before."""

    @property
    def generation(self) -> int:
        return self._me.generation

    def look(self) -> Owner | None:
        """Who has the place, or had it last. Raises OSError."""
        found = self._read()
        return found[1] if found else None

    def wait_until_free(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Versioned | None:
        """Returns what lies there, None where nothing does, once no living job has the place. Writes nothing.

        An owner on another machine is waited for until it has not written for LEASE_SECONDS. Raises RunOwned, OSError.
        """
        until, seen = None, None
        while (found := self._read()) is not None:
            version, owner = found
            if owner.run != self._me.run:
                raise RunOwned(
                    f"{self._store.address} is of another recipe: it holds {owner.run!r}, this is {self._me.run!r}; "
                    "give each run a location of its own"
                )
            left = 0.0 if owner.job == self._me.job else _seconds_to_wait(owner, self._me, time.time())
            if not left:
                return version
            now = clock()
            if left == float("inf") or (seen is not None and seen != version.version):
                raise RunOwned(
                    f"{self._store.address} belongs to a run that is alive ({owner.text()}); stop it, or give this one "
                    f"another directory and other locations; if it is a copy of that run's files, delete its {OWNER}"
                )
            until, seen = until or now + left, version.version
            if now >= until:
                return version
            sleep(min(LOOK_SECONDS, until - now))
        return None

    def take(self, generation: int) -> None:
        """Takes the place with this generation, or a higher one where its last owner had as many.

        Waits and raises as `wait_until_free`; of two that take it at one moment, one is refused.
        """
        while True:
            version = self.wait_until_free()
            self.is_new = version is None
            last = 0 if version is None else _decoded(version.data).generation
            if self._write(version, dataclasses.replace(self._me, generation=max(generation, last + 1))):
                return

    def hold(self) -> None:
        """Writes the record again, if it is still this one's. Raises OwnershipLost, OSError."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            assert self._held is not None, "a place is taken before it is held"
            while not self._write(self._held, self._me):
                self._adopt()

    def check(self) -> None:
        """As `hold`, without writing. Raises OwnershipLost, OSError."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            began = time.monotonic()
            found = self._read()
            if found is None or not self._is_mine(found[1]):
                raise self._lose(found[1] if found else None)
            self._seen = began

    def check_now_and_then(self) -> None:
        """As `check`, where this has not seen its own record for a moment: before each of many small writes."""
        if self._lost is not None or time.monotonic() - self._seen > SURE_SECONDS:
            self.check()

    def release(self, *, unused: bool = False) -> None:
        """Says that nobody has the place any more. `unused`: nothing was trained, so no trace of it stays either."""
        with self._lock:
            if self._held is None or self._lost is not None:
                return
            # A copy that is under way in another thread must not take the place back with its next look.
            self._lost = OwnershipLost(f"this job has given the run at {self._store.address} back")
            if unused and self.is_new:
                self._store.delete(OWNER)
            else:
                self._write(self._held, dataclasses.replace(self._me, released=True))

    def _write(self, before: Versioned | None, owner: Owner) -> bool:
        """Whether it was written; the condition did not hold otherwise."""
        owner = dataclasses.replace(owner, time=time.time(), nonce=secrets.token_hex(8))
        data, began = owner.encode(), time.monotonic()
        try:
            if before is None:
                version = self._store.create(OWNER, data)
            else:
                version = self._store.replace(OWNER, data, before.version)
        except Conflict:
            found = self._read()
            if found is None or found[1].nonce != owner.nonce:
                return False
            version = found[0].version  # an attempt that got no answer had been heard
        self._me = dataclasses.replace(owner, released=False)
        self._held = Versioned(data, version)
        self._seen = began
        return True

    def _adopt(self) -> None:
        """After a write that lost against another: was it one of this owner's own, that came late?"""
        found = self._read()
        if found is None or not self._is_mine(found[1]):
            raise self._lose(found[1] if found else None)
        self._held = found[0]

    def _is_mine(self, owner: Owner) -> bool:
        return (owner.job, owner.generation, owner.process) == (self._me.job, self._me.generation, self._me.process)

    def _lose(self, owner: Owner | None) -> OwnershipLost:
        who = f"it belongs to {owner.text()} now" if owner else f"its {OWNER} is gone"
        self._lost = OwnershipLost(
            f"this job (generation {self._me.generation}) has lost the run at {self._store.address}: {who}; "
            "nothing is saved any more, the other one goes on"
        )
        self._lost.job = owner.job if owner else ""
        return self._lost

    def _read(self) -> tuple[Versioned, Owner] | None:
        try:
            found = self._store.read_versioned(OWNER)
        except FileNotFoundError:
            return None
        try:
            return found, _decoded(found.data)
        except (ValueError, TypeError) as error:
            raise RunOwned(
                f"{self._store.address}/{OWNER} cannot be understood ({error}); if no other job uses this run, "
                "delete that file"
            ) from error


def living(store: Store) -> Owner | None:
    """Whoever has a place and may be alive, on this machine or another one. Raises RunOwned, OSError."""
    me = this_process("", "")
    found = Ownership(store, me).look()
    return found if found is not None and _seconds_to_wait(found, me, time.time()) else None


def check_job(store: Store, job: str) -> None:
    """For who belongs to a job and is not its owner: raises OwnershipLost where the place is another job's; OSError."""
    try:
        owner = _decoded(store.read(OWNER))
    except FileNotFoundError:
        return
    except (ValueError, TypeError) as error:
        raise OwnershipLost(f"{store.address}/{OWNER} cannot be understood ({error})") from error
    if owner.job != job:
        raise OwnershipLost(f"job {job} has lost the run at {store.address}: it belongs to {owner.text()} now")


def _decoded(data: bytes) -> Owner:
    """Raises ValueError, TypeError."""
    owner = Owner(**json.loads(data))
    for field in dataclasses.fields(Owner):
        value = getattr(owner, field.name)
        kinds = {"int": int, "float": int | float, "bool": bool, "str": str}[str(field.type)]
        if not isinstance(value, kinds) or (field.type != "bool" and isinstance(value, bool)):
            raise ValueError(f"{field.name} is {value!r}")
    return owner


def _seconds_to_wait(owner: Owner, me: Owner, now: float) -> float:
    """0: gone. Infinite: alive. Else how long to look whether it writes again. Reads /proc where it may know."""
    if owner.released or owner.process == me.process:
        return 0.0
    there, here = owner.process.split(), me.process.split()
    if len(there) == 4 and there[:2] == here[:2] and "-" not in here[:2]:
        return float("inf") if _identity(owner.pid) == owner.process else 0.0
    return max(0.0, LEASE_SECONDS - max(0.0, now - owner.time))


def _identity(pid: int) -> str:
    """Empty parts where /proc does not say."""
    stat = living_stat_of(pid)
    boot, namespace = _text("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid")
    return f"{boot} {namespace} {pid} {stat[STARTED] if stat else '-'}"


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip() or "-"
    except OSError:
        return "-"


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return "-"
