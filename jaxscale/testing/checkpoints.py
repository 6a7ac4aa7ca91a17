"""Changes a file of a durable step as its writer would have written it, or damages one."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from jaxscale.checkpoint.layout import MANIFEST, json_text
from jaxscale.checkpoint.manifest import digest_of_value


def rewrite(step: Path, name: str, text: str) -> None:
    """Gives a file of a step another content, and tells the manifest: for what only other machines would write."""
    (step / name).write_text(text)
    raw = json.loads((step / MANIFEST).read_bytes())
    del raw["digest"]
    raw["files"][name] = [len(text.encode()), xxhash.xxh3_128_hexdigest(text.encode())]
    (step / MANIFEST).write_text(json_text(raw | {"digest": digest_of_value(raw)}))


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file; negative ones count from its end."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
