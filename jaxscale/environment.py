"""Where a run runs: versions, flags, devices, commit; a small dict for environment.json and for every checkpoint.

It holds no host name, user or path, so two runs can be compared and a report can be shared. Read next:
`run_directory.py`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxscale import config

PACKAGES = (
    "jaxscale",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda13-plugin",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
)
"""Packages whose version can change what a run computes or stores."""

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables that hold many flags, separated by spaces."""

PREFIXES = ("JAX_", "XLA_PYTHON_", "NCCL_")
LOCAL = ("HOST", "ADDRESS", "PROCESS_ID", "DIR", "FILE", "PATH")
"""Words in the name of a variable that says where, not how."""

SOURCES = (".py", ".toml")
"""Endings of new files that count as uncommitted changes; a run's own output must not."""

GIT_LIMIT_SECONDS = 5.0


def environment(folder: Path | None = None) -> dict[str, Any]:
    """Package versions, Python, flags, devices, commit of `folder` (default: the current one) and a digest of what is
    not committed there. Asks for the devices, so it must come after the world has formed.
    """
    fixed = _known or {"packages": packages(), "git": git(folder or Path.cwd())}
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": fixed["packages"],
        "flags": flags(os.environ),
        "devices": devices(),
        "git": fixed["git"],
    }


_known: dict[str, dict[str, str]] = {}


def remember_code() -> None:
    """Keeps packages and commit as they are now, when the code has just been imported, for what this process forks."""
    _known.update(packages=packages(), git=git(Path.cwd()))


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `path: old -> new` of what differs between two environments. Pure."""
    return config.diff(dict(old), dict(new))


def packages() -> dict[str, str]:
    """Installed versions of the packages that matter; those that are not installed are left out."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def flags(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that steer JAX, XLA and the device libraries. Values that are paths are not shown."""
    found: dict[str, str] = {}
    for name, value in sorted(variables.items()):
        if name in FLAGS:
            found[name] = " ".join(_without_path(flag) for flag in value.split())
        elif name.startswith(PREFIXES) and not any(word in name for word in LOCAL):
            found[name] = _without_path(value)
    return found


def devices() -> dict[str, Any]:
    """How many devices of which kind, and in how many processes."""
    kinds = Counter(device.device_kind for device in jax.devices())
    return {"kinds": dict(sorted(kinds.items())), "count": jax.device_count(), "processes": jax.process_count()}


def git(folder: Path) -> dict[str, str]:
    """Commit of the repository around `folder` and a digest of changes and new source files; empty without one."""
    answer = _git(folder, "rev-parse", "HEAD", "--show-toplevel")
    if answer is None:
        return {}
    commit, root = answer.decode(errors="surrogateescape").splitlines()
    changes = _git(folder, "diff", "HEAD", "--binary") or b""
    digest = hashlib.sha256(changes)
    names = _git(Path(root), "ls-files", "--others", "--exclude-standard", "-z") or b""
    new = [name for name in names.decode(errors="surrogateescape").split("\0") if name.endswith(SOURCES)]
    for name in sorted(new):
        digest.update(name.encode(errors="surrogateescape") + b"\0" + _content(Path(root, name)))
    return {"commit": commit, "uncommitted": digest.hexdigest()[:16] if changes or new else ""}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b"(unreadable)"


def _without_path(value: str) -> str:
    name, equals, content = value.rpartition("=")
    return f"{name}{equals}(path)" if any(mark in content for mark in "/\\") else value


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=GIT_LIMIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
