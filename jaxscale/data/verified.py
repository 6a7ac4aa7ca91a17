"""Opening a token folder for training: everything in it is compared with its content hash, once per version.

A damaged file would train without a word: ids are only numbers. Reading a large corpus at every start would take too
long, so `verified.json` remembers size, modification time and inode of each file as they were when all was found whole;
where one is another now, everything is read again. It lies in the folder, or in the user's cache folder where that one
cannot be written. Read next: `ensure.py`, which rebuilds what is damaged; `corpus.py`, which reads the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from pathlib import Path

import xxhash

from jaxscale.cache import cache_folder
from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.inspect_corpus import damage_in_words
from jaxscale.data.manifest import load_manifest, selection_flags
from jaxscale.data.progress import show_progress
from jaxscale.data.token_file import DOCUMENT_BYTES, DOCUMENTS, HEADER, TOKENS, TokenFile, load_header, open_token_file

VERIFIED = "verified.json"
SHOWN_FROM = 1 << 30
"""Bytes of tokens from which reading them takes long enough to be shown."""

Version = dict[str, list[int]]
"""By file name: size, modification time in nanoseconds, inode."""


def open_verified(folder: str | Path, tokenizer_hash: str = "") -> TokenFile:
    """`open_token_file`, and `verify` unless this version of the files has been verified.

    What is damaged is named by shard and documents.

    Raises DamagedData and DataError as these do. Safe in many processes at once: those that come before the first is
    done read the files, too.
    """
    folder = Path(folder)
    try:
        return _open_verified(folder, tokenizer_hash)
    except DamagedData as error:
        raise DamagedData(f"{error}{damage_in_words(folder)}") from error


def _open_verified(folder: Path, tokenizer_hash: str) -> TokenFile:
    version = _version(folder)
    file = open_token_file(folder, tokenizer_hash)
    if version is None or version not in _remembered(folder):
        size = file.tokens.nbytes
        quiet = contextlib.nullcontext(lambda consumed, tokens: None)  # noqa: ARG005 - the signature of a Report
        with show_progress(folder.name, size, "checking") if size >= SHOWN_FROM else quiet as report:
            file.verify(report)
        if version == _version(folder):  # nobody wrote to it meanwhile
            remember(folder)
    return file


def remember(folder: Path) -> None:
    """Notes that the files, as they are now, are what the header says. Where nothing can be written, nothing is."""
    text = json.dumps(_version(folder), indent=1) + "\n"
    for place in _places(folder):
        new = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(text)
            os.replace(new, place)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            continue
        return


def how_to_rebuild(folder: Path, error: DataError) -> str:
    """What to add to the message of a damaged folder that the user has built; nothing for other errors."""
    return rebuild_command(folder) if isinstance(error, DamagedData) else ""


def rebuild_command(folder: Path) -> str:
    """How to make a damaged folder again, as the end of a message."""
    sources, tokenizer = "PATH...", ""
    with contextlib.suppress(DataError):  # the header may be what is damaged
        header = load_header(folder)
        names = [shlex.quote(name) for name, _ in header.sources[:5]]
        sources = " ".join([*names, *(["..."] if len(header.sources) > 5 else [])]) or sources
        tokenizer = "" if header.tokenizer_name == "bytes" else " --tokenizer TOKENIZER.json"
        tokenizer += selection_flags(load_manifest(folder))
    return (
        f". Delete the folder {folder}, then make it again with `jaxscale data build {sources}{tokenizer} --out "
        f"{shlex.quote(str(folder))}`"
    )


def _version(folder: Path) -> Version | None:
    try:
        found = {name: os.stat(folder / name) for name in (HEADER, TOKENS, DOCUMENTS, DOCUMENT_BYTES)}
    except OSError:
        return None
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in found.items()}


def _remembered(folder: Path) -> list[Version]:
    found = []
    for place in _places(folder):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(place.read_bytes()))
    return found


def _places(folder: Path) -> tuple[Path, Path]:
    name = xxhash.xxh3_128_hexdigest(str(folder.absolute()).encode())
    return folder / VERIFIED, cache_folder("verified") / f"{name}.json"
