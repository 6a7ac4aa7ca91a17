"""The files beside the arrays' bytes that make a folder a checkpoint of Orbax's layout: zarr version 3, a chunk a file.

What Orbax 0.12 writes with `use_ocdbt=False` and without compression, and reads back; checked by
tests/contracts/test_orbax_reads.py. Data in, data out. Read next: `persist.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from typing import Any

from jaxscale.checkpoint.boxes import Box, lengths, text
from jaxscale.checkpoint.manifest import Arrays

HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
DICT_KEY = 2
"""Orbax's number for a key of a dict."""


def chunk_shape(path: str, boxes: Collection[Box]) -> tuple[int, ...]:
    """The shape that all shards of an array have. Raises ValueError where they differ or do not lie on its grid."""
    shapes = {lengths(box) for box in boxes}
    if len(shapes) != 1:
        raise ValueError(f"{path} has shards of different shapes: {sorted(map(text, boxes))[:4]}")
    (shape,) = shapes
    for box in boxes:
        chunk_file(path, box, shape)
    return shape


def chunk_file(path: str, box: Box, chunk: tuple[int, ...]) -> str:
    """Name, below the array's folder, of the file with this box. Raises ValueError where it is no chunk of the grid."""
    if any(start % size or stop - start != size for (start, stop), size in zip(box, chunk, strict=True)):
        raise ValueError(f"{path} {text(box)} is no chunk of a grid of {list(chunk)}")
    return "/".join(["c", *(str(start // size) for (start, _), size in zip(box, chunk, strict=True))])


def array_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """`zarr.json` of an array."""
    is_float = "float" in dtype
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": False if dtype == "bool" else 0.0 if is_float else 0,
    }


def tree_metadata(arrays: Arrays, chunks: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`_METADATA` of a nested dict of arrays, by path."""
    leaves = {}
    for path in arrays:
        keys = path.split("/")
        leaves[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(chunks[path]),
            },
        }
    return {
        "tree_metadata": leaves,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def checkpoint_metadata(item: str) -> dict[str, Any]:
    """`_CHECKPOINT_METADATA` of a checkpoint with one item."""
    now = time.time_ns()
    return {
        "item_handlers": {item: HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }


def as_text(value: Mapping[str, Any]) -> str:
    """How all of them are written."""
    return json.dumps(value)
