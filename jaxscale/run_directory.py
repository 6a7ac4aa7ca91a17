"""The run directory: the files other tools rely on, and a lock that keeps a second run out.

    config.json  environment.json  metrics.jsonl  events.jsonl  logs/  tokenizer/  checkpoints/

Nothing but the lock and the logs is written before `begin`, so a run that is refused leaves nothing behind; `begin`
comes before any other writer, and config.json first: whatever moment a start is killed at, or the disk is full, the
same command can start again. Read next: `track/jsonl.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint.layout import PARTIAL, write_json
from jaxscale.config import Config, ConfigError, config_hash, to_dict
from jaxscale.track import lines
from jaxscale.track.jsonl import Appender, backwards
from jaxscale.train.protocols import World

LOCK = ".lock"
CONFIG = "config.json"
LOGS = "logs"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
WITNESS = "witness-"
"""How the files of a supervised run's witness begin, which votes on who coordinates."""
OWNERSHIP = ("owner.json", ".owner.json.lock", ".owner.json.partial", "locations.json", "locations.json.partial")
"""Whose the run is and how its further locations stand: what a coordinator writes before its workers begin."""
LOOK_SECONDS = 0.2
"""For so long a lock may be held by somebody who only looks whether it is (`jaxscale status`)."""
LOG_BYTES, LOG_FILES = 10_000_000, 5
TAIL_BYTES = 1 << 20
"""How much of the end of a file is searched for the highest epoch: epochs grow along the file."""


class RunDirectoryError(ConfigError):
    """The run directory cannot be used. The message says what, why, and how to fix it."""


class RunDirectory:
    """An open run directory. Every process of the world has one; process 0 holds the lock."""

    def __init__(self, path: Path, config: Config, epoch: int, world: World, lock: _Lock | None, is_new: bool) -> None:
        self.path = path
        self.epoch = epoch
        """Incarnation of the world on this directory: 1, 2, 3, ..."""
        self.is_new = is_new
        """Whether nothing was trained here before."""
        self._config, self._world, self._lock = config, world, lock
        self._events: Appender | None = None
        self._events_lock = threading.Lock()
        self._log = _start_log(path, world)

    @property
    def is_unused(self) -> bool:
        """Whether nothing was trained here before and nothing has begun yet."""
        return self.is_new and not (self.path / CONFIG).exists()

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def events(self) -> Path:
        return self.path / EVENTS

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def native_log(self) -> Path:
        """What native code of this process prints."""
        return self.path / LOGS / f"native-{self._world.index}.log"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Everything has been checked and training starts: writes config.json, environment.json and `worker_started`.

        Comes before anything else is written here: config.json is what makes the folder a run directory. Raises OSError
        where the disk does not take it.
        """
        if self._world.is_writer:
            write_json(self.path / CONFIG, to_dict(self._config))
            write_json(self.path / "environment.json", dict(environment))
        self.event("worker_started", pid=os.getpid(), host=_host(self._world), rank=self._world.index)

    def event(self, kind: str, *, source: str = "worker", **fields: Any) -> None:
        """Appends a line to events.jsonl. May be called from any thread. Raises OSError (full disk)."""
        with self._events_lock:
            if self._events is None:
                self._events = Appender(self.events)
        line = {"time": time.time(), "mono": time.monotonic(), "epoch": self.epoch, "source": source, "kind": kind}
        self._events.append(lines.encode(line | fields))

    def close(self) -> None:
        """Ends the logs and frees the lock. A directory that this process made and never began to use is deleted.

        Where a coordinator has written down how a start went, that is kept, with the logs beside it.
        """
        logging.getLogger().removeHandler(self._log)
        with contextlib.suppress(OSError):  # a full disk: what it could not take of the log is lost
            self._log.close()
        if self._events is not None:
            self._events.close()
            self._events = None
        if self.is_unused and not self._world.is_writer:
            _delete_unused(self.path, f"*-{self._world.index}.log")
        if self._lock is not None:
            if self.is_unused and self._lock.is_alone():
                (self.path / LOCK).unlink(missing_ok=True)
                _delete_unused(self.path, "*")
            self._lock.free()
            self._lock = None


def run_path(config: Config) -> Path:
    """Where a run of this config lies, from the root."""
    return Path(config.run.dir or Path("runs") / f"{config.name}-{config_hash(config)}").absolute()


def open_run(config: Config, world: World | None = None, job: str = "") -> RunDirectory:
    """Opens, or makes, the directory of a run; all processes of a world call it once the world has formed.

    job: of a coordinator; others of the same job may have the directory open too, as the votes decide who leads.

    Raises RunDirectoryError, on all processes: another run holds it, it belongs to another recipe, it is a folder of
    something else, or it cannot be made.
    """
    world = world or World()
    path = run_path(config)
    lock: _Lock | None = None
    answer: dict[str, Any] = {}
    if world.is_writer:
        try:
            lock = _Lock(path, job)
            answer = {"new": _check(path, config), "epoch": max(world.epoch, 1 + highest_epoch(path))}
        except (RunDirectoryError, OSError) as error:
            if lock is not None:
                lock.free(unused=not (path / CONFIG).exists())
            answer = {"error": str(error if isinstance(error, RunDirectoryError) else _unusable(path, error))}
    if world.processes > 1:
        from jaxscale.world import broadcast_json  # imports JAX, which a coordinator does without

        answer = broadcast_json(world, answer)
    if "error" in answer:
        raise RunDirectoryError(answer["error"])
    try:
        return RunDirectory(path, config, answer["epoch"], world, lock, answer["new"])
    except OSError as error:  # no room for the folder of the logs
        if lock is not None:
            lock.free(unused=not (path / CONFIG).exists())
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"run directory {path} cannot be used: {error.strerror}; repair that, or give another --run.dir"
    )


def highest_epoch(path: Path) -> int:
    """The highest epoch that metrics.jsonl and events.jsonl speak of; 0 for a new directory."""
    found = [0]
    for name in (METRICS, EVENTS):
        epochs = (line.get("epoch") for line in backwards(path / name, limit=TAIL_BYTES))
        found += [epoch for epoch in epochs if isinstance(epoch, int)]
    return max(found)


def _check(path: Path, config: Config) -> bool:
    """Whether the locked directory is new. Raises RunDirectoryError when it is not this recipe's."""
    if not (path / CONFIG).exists():
        other = sorted(p.name for p in path.iterdir() if not _is_skeleton(p))
        if other:
            raise RunDirectoryError(
                f"{path} is not a run directory: it holds {', '.join(other[:5])}{' ...' if len(other) > 5 else ''} "
                f"and no {CONFIG}; give an empty or new folder as --run.dir"
            )
        return True
    try:
        name = json.loads((path / CONFIG).read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{path / CONFIG} cannot be read ({type(error).__name__}: {error}); put it back (each step in "
            f"{path / 'checkpoints'} has a copy), or give another --run.dir"
        ) from error
    if name != config.name:
        raise RunDirectoryError(
            f"{path} is the run directory of another recipe: it trains {name!r}, this is {config.name!r}; "
            "give another --run.dir"
        )
    return False


def _is_skeleton(path: Path) -> bool:
    """Whether this is what a start that was cut short leaves: nothing was trained, so nothing is lost or mixed up."""
    if path.name == METRICS:  # opened and never written to
        return path.is_file() and path.stat().st_size == 0
    if path.name == EVENTS:  # a coordinator writes them from its start on, its workers once they have begun
        return path.is_file() and all(line.get("source") == "coordinator" for line in backwards(path))
    return path.name in (LOCK, LOGS, CONFIG + PARTIAL, *OWNERSHIP) or path.name.startswith(WITNESS)


class _Lock:
    """A lock on a directory that ends with the process, however that ends. Made on a folder that may not exist yet.

    Held alone, or together with others of the same job.
    """

    def __init__(self, folder: Path, job: str = "") -> None:
        path = folder / LOCK
        self._job = job
        made, deadline = False, time.monotonic() + LOOK_SECONDS
        while True:
            made = _make(folder) or made
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(file, 4096, 0).decode(errors="replace").strip()
                if job and holder.startswith(f"job {job}:") and _is_shared(file):
                    self._path, self._file, self._made = path, file, made
                    return
                os.close(file)
                if not isinstance(error, BlockingIOError):
                    raise
                if time.monotonic() < deadline:
                    time.sleep(LOOK_SECONDS / 10)
                    continue
                raise RunDirectoryError(
                    f"{folder} is in use by another run ({holder or 'which has just started'}); "
                    "wait for it, stop it, or give another --run.dir"
                ) from None
            try:
                is_current = os.fstat(file).st_ino == os.stat(path).st_ino
            except FileNotFoundError:
                is_current = False
            if is_current:
                break
            os.close(file)  # its last holder deleted the folder while we waited for the lock
        self._path, self._file, self._made = path, file, made
        try:
            whose = f"job {job}: " if job else ""
            text = f"{whose}pid {os.getpid()} on {socket.gethostname()}\n".encode()
            # Over what an earlier holder wrote: a coordinator that starts again on a full disk has that much room.
            os.pwrite(file, text, 0)
            os.ftruncate(file, len(text))
            if job:
                fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            self.free(unused=not (folder / CONFIG).exists())
            raise

    def is_alone(self) -> bool:
        """Whether no other coordinator of the job holds it too."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free(self, *, unused: bool = False) -> None:
        """`unused`: nothing was trained here, so the file goes too, and the folder where this lock made it."""
        if unused:
            self._path.unlink(missing_ok=True)
            if self._made:
                with contextlib.suppress(OSError):
                    self._path.parent.rmdir()
        if not self._job:  # else another coordinator may still be there
            os.ftruncate(self._file, 0)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # a child may hold the file too; closing it here would not be enough
        os.close(self._file)


def _is_shared(file: int) -> bool:
    """Takes a lock together with its holders, where they share it."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make(folder: Path) -> bool:
    if folder.exists():
        if not folder.is_dir():
            raise RunDirectoryError(f"{folder} is a file; give a folder as --run.dir")
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return True


def _delete_unused(path: Path, logs: str) -> None:
    """Deletes the skeleton of a run that was refused before it began, and nothing that anyone else put there.

    Each process of a world deletes its own logs, and the last one the folders.
    """
    if (path / EVENTS).exists():
        return
    for log in (path / LOGS).glob(logs):
        log.unlink(missing_ok=True)
    left = [path / name for name in (METRICS, CONFIG + PARTIAL, *OWNERSHIP)]  # of a start that was cut short
    for old in (*left, *path.glob(f"{WITNESS}*")):
        if _is_skeleton(old):
            old.unlink(missing_ok=True)
    for folder in (path / LOGS, path):
        try:
            folder.rmdir()
        except FileNotFoundError:  # another process was faster
            continue
        except OSError:
            return


class _LogFile(logging.handlers.RotatingFileHandler):
    """Makes its folder when the first line comes: another process may have deleted it, refusing the run."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk that does not take a line of the log gets no traceback on the terminal for each."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def _host(world: World) -> str:
    return world.host or socket.gethostname()


def _start_log(path: Path, world: World) -> logging.Handler:
    """Sends what is logged to the rotated file of this host and rank, and warnings to the terminal as before."""
    folder = path / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{_host(world)}-{world.index}.log"
    handler = _LogFile(file, maxBytes=LOG_BYTES, backupCount=LOG_FILES, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    if not root.handlers:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        root.addHandler(terminal)
    root.addHandler(handler)
    logging.getLogger("jaxscale").setLevel(logging.INFO)
    return handler
