"""The user's cache folder: what can be made again and is worth keeping between runs, over all runs of a user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$JAXSCALE_CACHE/name`, by default `~/.cache/jaxscale/name`. Not created."""
    root = os.environ.get("JAXSCALE_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "jaxscale") / name
