"""What a corpus was made of and what became of it: manifest.json in a token folder. Read next: `inspect_corpus.py`.

Parents (inputs with size and digest), code, selection, schema, what was kept and dropped of each input and why, the
first documents dropped for each reason, and the digest of every shard of every file. Two builds of the same input by
the same code have the same manifest. Its own digest is in it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from jaxscale import __version__
from jaxscale.data import shards
from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.selection import Selection
from jaxscale.data.shards import ShardDigests, digest_file
from jaxscale.data.sources import WHOLE_CONTENT, Input, identities, open_input
from jaxscale.data.tally import Counts, Tally
from jaxscale.data.token_file import HEADER, TOKENIZER, Header

MANIFEST = "manifest.json"
FORMAT = "jaxscale-corpus-manifest"
VERSION = 1
_PACKAGES = ("numpy", "tokenizers", "pyarrow", "rensa", "array-record", "google-crc32c")
_COUNTS = ("documents", "tokens", "bytes", "longest", "quarantined", "lost")

Manifest = dict[str, Any]


def make_manifest(
    header: Header,
    inputs: Sequence[Input],
    digests: Sequence[str],
    selection: Selection,
    tally: Tally,
    files: Mapping[str, ShardDigests],
) -> Manifest:
    """digests: of the inputs, `digest_inputs`; files: of every file of the folder but the manifest itself."""
    names = names_of(inputs)
    total = tally.total
    value: Manifest = {
        "format": FORMAT,
        "version": VERSION,
        "content": header.content,
        "plan": header.plan,
        "code": code_version(),
        "selection": selection.facts(),
        "schema": {
            "text": f"field {selection.text_field!r}, UTF-8",
            "tokens": header.dtype,
            "vocabulary": header.vocabulary,
            "end_of_document": header.end_of_document,
            "tokenizer": header.tokenizer_name,
            "tokenizer_hash": header.tokenizer_hash,
        },
        "total": {**_plain(total), "dropped": dict(sorted(total.dropped.items()))},
        "examples": {
            reason: [{"input": names[number], "record": record} for number, record in shown]
            for reason, shown in sorted(tally.examples.items())
        },
        "parents": [
            {
                "name": name,
                "kind": source.kind,
                "size": source.size,
                "digest": digest,
                **_plain(tally.by_input.get(number, Counts())),
            }
            for number, (name, source, digest) in enumerate(zip(names, inputs, digests, strict=True))
        ],
        "shard_bytes": shards.SHARD_BYTES,
        "files": {name: digests.facts() for name, digests in files.items()},
    }
    return {**value, "digest": _digest(value)}


def text(manifest: Manifest) -> str:
    """The content of manifest.json."""
    return json.dumps(manifest, indent=1) + "\n"


def load_manifest(folder: Path) -> Manifest | None:
    """None where there is none: the folder is of an older version. Raises DamagedData when it is not as written."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedData(f"{path} cannot be read ({error}); build the folder again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DamagedData(f"{path} is no manifest of a corpus; build the folder again")
    if raw.get("version") != VERSION:
        raise DataError(
            f"{path} has version {raw.get('version')!r}, this jaxscale reads version {VERSION}; use the jaxscale that "
            "made it, or build the folder again"
        )
    digest = raw.pop("digest", "")
    if digest != _digest(raw):
        raise DamagedData(f"{path} has digest {_digest(raw)}, it says {digest}; it was changed: build the folder again")
    return {**raw, "digest": digest}


def selection_flags(manifest: Manifest | None) -> str:
    """What `jaxscale data build` was told to select documents, each flag after a space."""
    if manifest is None:
        return ""
    chosen, quarantined = manifest["selection"], manifest["total"]["quarantined"]
    flags = [f" --text-field {shlex.quote(chosen['text_field'])}"] if chosen["text_field"] != "text" else []
    flags += [f" --filters {' '.join(chosen['filters'])}"] if chosen["filters"] else []
    flags += [f" --deduplicate {chosen['deduplicate']}"] if chosen["deduplicate"] != "none" else []
    flags += [f" --similarity {chosen['similarity']:g}"] if "similarity" in chosen else []
    flags += [f" --max-bad {quarantined}"] if quarantined else []
    return "".join(flags)


def names_of(inputs: Sequence[Input]) -> list[str]:
    """Names of inputs without the part of the path that all local ones have in common."""
    local = [os.path.abspath(source.address) for source in inputs if not source.remote and source.kind != "builtin"]
    common = os.path.commonpath([os.path.dirname(path) for path in local]) if local else ""
    return [
        source.address
        if source.remote or source.kind == "builtin"
        else os.path.relpath(os.path.abspath(source.address), common)
        for source in inputs
    ]


def digest_inputs(inputs: Sequence[Input]) -> list[str]:
    """`xxh3_128:` and the digest of all stored bytes of each input.

    Of remote inputs of more than 256 MiB in all `identity:` and what stands for their content: they are read once only.
    """
    size = sum(source.size for source in inputs)
    return [
        f"identity:{identities([source])[0]}"
        if source.kind == "builtin" or (source.remote and size > WHOLE_CONTENT)
        else f"xxh3_128:{_digest_input(source)}"
        for source in inputs
    ]


def _digest_input(source: Input) -> str:
    digest = xxhash.xxh3_128()
    with open_input(source) as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


@functools.cache
def code_version() -> dict[str, Any]:
    """Version of jaxscale, a digest of the sources of this room, and versions of what takes part in a build."""
    digest = xxhash.xxh3_128()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"jaxscale": __version__, "data": digest.hexdigest(), "packages": versions}


def digest_small_files(folder: Path) -> dict[str, ShardDigests]:
    """Of the header and of everything in the tokenizer's folder."""
    found = {}
    for path in (folder / HEADER, *sorted((folder / TOKENIZER).rglob("*"))):
        if path.is_file():
            found[str(path.relative_to(folder))] = digest_file(path)
    return found


def _plain(counts: Counts) -> dict[str, Any]:
    return {
        **{name: getattr(counts, name) for name in _COUNTS},
        "dropped": dict(sorted(counts.dropped.items())),
    }


def _digest(value: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
