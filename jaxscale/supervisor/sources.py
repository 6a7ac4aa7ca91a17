"""A digest of the Python code that a worker runs: jaxscale itself and what a recipe brought along.

A stored program is only right for the code it was traced from. Computed in the zygote, before workers are forked. Read
next: `programs.py`.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path

import xxhash


@functools.cache
def sources_digest() -> str:
    """Of all files of jaxscale, and of every imported module that lies outside Python's own and installed packages."""
    package = Path(__file__).resolve().parent.parent
    installed = [Path(path).resolve() for path in set(sysconfig.get_paths().values())]
    files = set(package.rglob("*.py"))
    for module in list(sys.modules.values()):
        name = getattr(module, "__file__", None)
        if isinstance(name, str) and name.endswith(".py") and (file := Path(name).resolve()).is_file():
            files |= {file} if not any(file.is_relative_to(place) for place in installed) else set()
    digest = xxhash.xxh3_128()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
