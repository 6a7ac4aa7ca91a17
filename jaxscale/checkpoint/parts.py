"""How the processes of a plain run tell the one that seals what each of them has written: files in the step's folder.

A world cannot meet on its devices in the background of training. Read next: `written.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxscale.checkpoint import layout
from jaxscale.checkpoint.boxes import Box
from jaxscale.checkpoint.manifest import Arrays, DamagedCheckpoint
from jaxscale.checkpoint.written import Part, merged, part_from_json, part_to_json, process_file, read_back

POLL_SECONDS = 0.1


def own_part(path: Path, wanted: Mapping[tuple[str, Box], str], arrays: Arrays) -> Part:
    """Compares this process's files with the digests of its shards; processes but the first say it in a file.

    Raises DamagedCheckpoint where they differ, and OSError.
    """
    itemsize = {name: jnp.dtype(dtype).itemsize for name, (_, dtype) in arrays.items()}
    part = read_back(path, layout.STATE_ITEM, wanted, itemsize)
    if jax.process_index():
        layout.write_json(path / process_file(jax.process_index()), part_to_json(part))
    return part


def all_parts(path: Path, own: Part, processes: int, seconds: float, is_abandoned: Callable[[], bool]) -> Part:
    """What all processes have written. Waits for them. Raises TimeoutError, and DamagedCheckpoint for nonsense."""
    parts = [own]
    deadline = time.monotonic() + seconds
    for index in range(1, processes):
        file = path / process_file(index)
        while not file.exists():
            if is_abandoned():
                raise TimeoutError(f"process {index} has not said what it wrote, and the save was given up")
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {index} has not said what it wrote within {seconds:g} s")
            time.sleep(POLL_SECONDS)
        try:
            parts.append(part_from_json(json.loads(file.read_bytes())))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{file} does not say what process {index} wrote ({error!r})") from error
    return merged(parts)
