"""A corpus on disk: one flat file of token ids, document offsets, and a header that says what they are.

    header.json           format, dtype, counts, tokenizer, content hash, sources (written last)
    tokens.bin            every document's ids, each document ended by the end-of-document token; uint16 or uint32
    documents.bin         int64: where each document starts in tokens.bin, and the end of the last one (n + 1)
    document_bytes.bin    int64: length of each document's text in UTF-8 bytes (n)
    tokenizer/            what made the ids
    manifest.json         what went in and what became of it, digests of all shards (see `manifest.py`)
    quarantine.jsonl      records that could not be used
    verified.json         which version of these files was found whole (see `verified.py`)

All numbers are little-endian. Read next: `sources.py` and `build.py`, which write this; `verified.py`, which opens it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.progress import Report
from jaxscale.data.tokenizer import load_tokenizer, token_dtype

FORMAT = "jaxscale-tokens"
VERSION = 1
HEADER, TOKENS, DOCUMENTS, DOCUMENT_BYTES = "header.json", "tokens.bin", "documents.bin", "document_bytes.bin"
TOKENIZER = "tokenizer"
_CHUNK = 1 << 24  # elements or bytes looked at at once when a whole file is scanned


@dataclass(frozen=True)
class Header:
    """What a token folder says of itself."""

    dtype: str
    """`uint16` or `uint32`."""
    tokens: int
    documents: int
    bytes: int
    """Text of all documents in UTF-8 bytes."""
    vocabulary: int
    largest_token: int
    end_of_document: int
    tokenizer_name: str
    tokenizer_hash: str
    content: str
    """xxh3_128 of tokens.bin followed by documents.bin."""
    plan: str
    """Hash of what went in: identity of each input, tokenizer, text field."""
    sources: tuple[tuple[str, int], ...]
    """Name and size in bytes of each input."""


@dataclass(frozen=True)
class TokenFile:
    """An open token folder. Arrays are read-only views of memory maps: nothing is read before it is used."""

    folder: Path
    header: Header
    tokens: np.ndarray
    """(tokens,) uint16 or uint32."""
    offsets: np.ndarray
    """(documents + 1,) int64, from 0 to the number of tokens."""
    document_bytes: np.ndarray
    """(documents,) int64."""

    def verify(self, report: Report | None = None) -> None:
        """Reads everything once. Raises DamagedData at the first thing that contradicts the header.

        `report`: told of the bytes and tokens read so far.
        """
        digest, largest = xxhash.xxh3_128(), 0
        for start in range(0, len(self.tokens), _CHUNK):
            part = self.tokens[start : start + _CHUNK]
            digest.update(part)
            largest = max(largest, int(part.max()))
            if report is not None:
                report((start + len(part)) * self.tokens.itemsize, start + len(part))
        if largest >= self.header.vocabulary:
            raise DamagedData(
                f"{self.folder / TOKENS} has token id {largest} beyond the vocabulary of {self.header.vocabulary}; "
                "the file is damaged or of another tokenizer: build it again"
            )
        for start in range(0, self.header.documents, _CHUNK):
            part = self.offsets[start : start + _CHUNK + 1]
            if (np.diff(part) < 1).any():
                raise DamagedData(
                    f"{self.folder / DOCUMENTS} has offsets that do not grow; it is damaged: build it again"
                )
            if (self.tokens[part[1:] - 1] != self.header.end_of_document).any():
                raise DamagedData(
                    f"{self.folder} has a document that does not end with token {self.header.end_of_document}; "
                    "offsets and tokens do not belong together: build it again"
                )
        for start in range(0, len(self.offsets), _CHUNK):
            digest.update(self.offsets[start : start + _CHUNK])
        if digest.hexdigest() != self.header.content:
            raise DamagedData(
                f"{self.folder} has content hash {digest.hexdigest()}, its header says {self.header.content}; "
                "the data was damaged or changed after it was built: build it again"
            )
        if int(self.document_bytes.min()) < 0 or int(self.document_bytes.sum()) != self.header.bytes:
            raise DamagedData(
                f"{self.folder / DOCUMENT_BYTES} adds up to {int(self.document_bytes.sum())} bytes of text, the header "
                f"says {self.header.bytes}; it is damaged: build it again"
            )


def is_token_folder(path: str | Path) -> bool:
    return (Path(path) / HEADER).is_file()


def open_token_file(folder: str | Path, tokenizer_hash: str = "") -> TokenFile:
    """Opens a token folder. `tokenizer_hash`: when given, the folder must have been built with that tokenizer.

    Raises DamagedData when something is missing, empty or truncated, DataError when the folder is foreign, of a newer
    format or of another tokenizer. Looks at no token: training opens folders with `verified.open_verified`.
    """
    folder = Path(folder)
    header = load_header(folder)
    if tokenizer_hash and header.tokenizer_hash != tokenizer_hash:
        raise DataError(_other_tokenizer(folder, header, tokenizer_hash))
    tokens = _map(folder / TOKENS, np.dtype(header.dtype).newbyteorder("<"), header.tokens, "tokens")
    offsets = _map(folder / DOCUMENTS, np.dtype("<i8"), header.documents + 1, "offsets")
    document_bytes = _map(folder / DOCUMENT_BYTES, np.dtype("<i8"), header.documents, "document lengths")
    if int(offsets[0]) != 0 or int(offsets[-1]) != header.tokens:
        raise DamagedData(
            f"{folder / DOCUMENTS} runs from {int(offsets[0])} to {int(offsets[-1])}, but the corpus has "
            f"{header.tokens} tokens; the folder is damaged: build it again"
        )
    return TokenFile(folder, header, tokens, offsets, document_bytes)


def _other_tokenizer(folder: Path, header: Header, tokenizer_hash: str) -> str:
    try:
        is_outdated = load_tokenizer(folder / TOKENIZER).hash != header.tokenizer_hash
    except DataError:
        is_outdated = False
    if is_outdated:
        return (
            f"{folder} was built by an older jaxscale, whose tokenizer {header.tokenizer_name} gave other ids "
            f"({header.tokenizer_hash[:8]}); delete the folder and build the data again"
        )
    return (
        f"{folder} was built with tokenizer {header.tokenizer_name} ({header.tokenizer_hash[:8]}), this run uses "
        f"{tokenizer_hash[:8]}; set data.tokenizer to {folder / TOKENIZER}, or build the data with this tokenizer"
    )


def load_header(folder: str | Path) -> Header:
    """Reads and checks header.json. Raises DataError."""
    path = Path(folder) / HEADER
    if not path.is_file():
        raise DataError(f"{folder} is no token folder ({HEADER} is not there); make one with `jaxscale data build`")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedData(f"{path} is not readable JSON ({error}); the folder is damaged: build it again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path} is not a header of {FORMAT}; the folder belongs to another program: give another path")
    if raw.get("version") != VERSION:
        raise DataError(
            f"{path} has format version {raw.get('version')!r}, this jaxscale reads version {VERSION}; build it again"
        )
    try:
        header = _parse(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedData(f"{path} is damaged ({type(error).__name__}: {error}); build it again") from error
    return header


def header_text(header: Header) -> str:
    """The content of header.json."""
    raw = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)}
    raw["sources"] = [{"name": name, "size": size} for name, size in header.sources]
    return json.dumps(raw, indent=1) + "\n"


def _parse(raw: dict[str, Any]) -> Header:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Header):
        value = raw[field.name]
        if field.type == "int" and (type(value) is not int or value < 0):
            raise TypeError(f"{field.name} is {value!r}, not a count")
        if field.type == "str" and type(value) is not str:
            raise TypeError(f"{field.name} is {value!r}, not a string")
        values[field.name] = value
    values["sources"] = tuple((str(source["name"]), int(source["size"])) for source in raw["sources"])
    header = Header(**values)
    if header.tokens == 0 or header.documents == 0 or header.documents > header.tokens or header.tokens >= 2**60:
        raise ValueError(f"{header.documents} documents with {header.tokens} tokens")
    largest = max(header.end_of_document, header.largest_token)
    if not 0 < header.vocabulary <= 2**31 or largest >= header.vocabulary:
        raise ValueError(f"token ids up to {largest} with a vocabulary of {header.vocabulary}")
    if header.dtype != token_dtype(header.vocabulary).name:
        raise ValueError(f"dtype {header.dtype!r} with a vocabulary of {header.vocabulary}")
    return header


def _map(path: Path, dtype: np.dtype, count: int, what: str) -> np.ndarray:
    if not path.is_file():
        raise DamagedData(f"{path} is not there; the token folder is damaged: build it again")
    size, expected = path.stat().st_size, count * dtype.itemsize
    if size != expected:
        state = "empty" if size == 0 else "truncated" if size < expected else "too long"
        raise DamagedData(
            f"{path} is {state}: {size} bytes where {count} {what} take {expected}; build the folder again"
        )
    # A plain array over the map: slicing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype, "r"))
