"""The shards of a state that a process is to write, kept on the host until their digests are known.

Orbax checks no array bytes, so each process takes the digest of every shard that it writes from the state itself. Read
next: `written.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from jaxscale import tree
from jaxscale.checkpoint.boxes import Box, box_of

CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class HeldShard:
    """A shard, in memory that stays as it is."""

    path: str
    box: Box
    data: np.ndarray[Any, Any]


def hold(state: Mapping[str, Any]) -> list[HeldShard]:
    """The shards of a state of `jax.Array`s that this process is the first to hold.

    On a CPU these are windows into the arrays (which can then not be donated in place, as with Orbax's own); elsewhere
    they are copied here, so that the arrays may be donated right after.
    """
    shards = [
        (path, box_of(shard.index, leaf.shape), shard.data)
        for path, leaf in tree.flatten(state).items()
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]
    for *_, data in shards:
        data.copy_to_host_async()
    return [HeldShard(path, box, np.asarray(data)) for path, box, data in shards]


def digests(held: Sequence[HeldShard]) -> dict[tuple[str, Box], str]:
    """xxh3_128 of each shard's bytes in C order, in hex."""
    found = {}
    for shard in held:
        flat = np.ascontiguousarray(shard.data).reshape(-1).view(np.uint8)
        digest = xxhash.xxh3_128()
        for start in range(0, flat.nbytes, CHUNK_BYTES):  # in pieces, so that other threads run meanwhile
            digest.update(flat[start : start + CHUNK_BYTES])
        found[shard.path, shard.box] = digest.hexdigest()
    return found
