"""Compiled programs kept between the epochs of a world: a worker that was re-forked neither traces nor compiles.

Each worker stores what it compiled with `jax.experimental.serialize_executable`, under a key of everything that the
program depends on: config, recipe, versions, flags, and the mesh with its devices. The file is a pickle, so it
is trusted only where this host's agent keeps it: a folder of mode 0700, files of mode 0600 with a digest, never taken
from the network. Read next: `worker_process.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pickle
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import xxhash

from jaxscale import jax_private
from jaxscale.config import Config, to_dict
from jaxscale.environment import flags, packages
from jaxscale.supervisor.sources import sources_digest
from jaxscale.train.programs import Compiled

MAGIC = b"jaxscale-program-1\n"
DIGEST_BYTES = 16
SHARE_SECONDS = 120.0
"""How long a worker waits for another one to compile the same program."""
LOOK_SECONDS = 0.05

logger = logging.getLogger(__name__)


class UntrustedProgram(RuntimeError):
    """A stored program that must not be loaded: damaged, of another user, or open to others."""


class StoredPrograms:
    """The `Programs` of a supervised worker."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> None:
        """`identity`: JSON-safe; what all programs of this worker depend on. Makes the folder, for this user alone.

        `devices`: those that the programs run on; None = all of this world.
        """
        self._folder, self._devices = folder, devices
        self._identity = repr(sorted(_flatten(identity)))
        self.compiled: list[str] = []
        """Names of the programs that were not found."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Compiled:
        """Loads the program, or compiles and stores it. What cannot be loaded is compiled anew and replaced.

        Of the workers that share this folder one compiles while the others wait for it, as long as that makes sense.
        """
        path = self.path(name)
        program = self._load(path)
        if program is None:
            with _turn(path):
                program = self._load(path)  # another one may have compiled it meanwhile
                if program is None:
                    program = self._compile(path, name, lower)
        return program

    def prepare(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> bool:
        """Compiles and stores the program for others, where it is not there yet; whether it was not. Loads nothing."""
        path = self.path(name)
        with _turn(path):
            if path.exists():
                return False
            self._compile(path, name, lower)
        return True

    def _load(self, path: Path) -> Any:
        try:
            return _load(path, self._devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # a pickle of another version raises anything; compiling is always right
            logger.warning("the stored program %s cannot be used (%s); it is compiled again", path.name, error)
            return None

    def _compile(self, path: Path, name: str, lower: Callable[[], jax.stages.Lowered]) -> Any:
        self.compiled.append(name)
        lowered = lower()
        with jax_private.without_compilation_cache():
            program = lowered.compile()
        _store(path, program)
        return program

    def path(self, name: str) -> Path:
        """Where the program of this name lies."""
        return self._folder / hashlib.sha256(f"{name}\n{self._identity}".encode()).hexdigest()[:32]


def program_identity(config: Config, processes: int, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What the programs of a world of `processes` over `devices` depend on, beside their names.

    Every rank runs the same program (one program, many data), so that what one compiled another one can load.
    """
    plain = to_dict(config)
    names = ("model", "optim", "train", "precision", "remat", "state", "pipeline", "across", "local", "mesh", "data")
    kept = {key: plain[key] for key in (*names, "phases")}
    return {
        "config": kept,
        "steps": config.steps,
        "seed": config.seed,
        "layer_stats": bool(config.run.layer_stats_every),
        "packages": packages(),
        "flags": flags(os.environ),
        "sources": sources_digest(),
        "devices": [(device.id, device.process_index, device.device_kind) for device in devices],
        "processes": processes,
    }


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Waits while another worker compiles this program, SHARE_SECONDS at most: after that it is compiled twice.

    Not on GPUs: there XLA shares the tuning of a program out over its processes, so all have to compile at once. Where
    the file system knows no locks nobody waits either. A lock ends with its process.
    """
    file = -1
    if jax.default_backend() != "gpu":
        with contextlib.suppress(OSError):
            file = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + SHARE_SECONDS
        while file >= 0 and time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOOK_SECONDS)
            except OSError:
                break
        yield
    finally:
        if file >= 0:
            os.close(file)


def _load(path: Path, devices: Sequence[jax.Device] | None) -> Any:
    from jax.experimental import serialize_executable

    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise UntrustedProgram(f"{path} belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}")
        data = file.read()
    head = len(MAGIC) + DIGEST_BYTES
    if data[: len(MAGIC)] != MAGIC or xxhash.xxh3_128_digest(data[head:]) != data[len(MAGIC) : head]:
        raise UntrustedProgram(f"{path} is damaged")
    program, inputs, outputs = pickle.loads(data[head:])
    return serialize_executable.deserialize_and_load(program, inputs, outputs, execution_devices=devices)


def _store(path: Path, program: jax.stages.Compiled) -> None:
    from jax.experimental import serialize_executable

    try:
        data = pickle.dumps(serialize_executable.serialize(program))
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(file, "wb") as stream:
            stream.write(MAGIC + xxhash.xxh3_128_digest(data) + data)
        os.replace(fresh, path)
    except (OSError, ValueError, TypeError, pickle.PicklingError) as error:
        # Costs the next recovery its compilation, no more.
        logger.warning("the program %s could not be stored: %s", path.name, error)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        found += _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [(prefix + key, repr(value))]
    return found
