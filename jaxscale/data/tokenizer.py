"""Text to token ids and back: a built-in byte-level tokenizer, and any `tokenizer.json`.

A tokenizer has a content hash; token folders and checkpoints store it, so tokenizers never mix. Read next:
`token_file.py`, what the ids are stored in.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from jaxscale.data.errors import DataError

if TYPE_CHECKING:
    import tokenizers

Tokens = np.ndarray
"""One dim of token ids, uint16 or uint32 (see `token_dtype`)."""

END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
)
"""Names under which tokenizers carry the token that ends a document, the first one found is taken."""

_TEXT_IS_TEXT = 2
"""Part of every file tokenizer's hash: 1 was when names of special tokens in a text became these tokens."""
_SETTINGS = "tokenizer_settings.json"
_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """What the data room needs of a tokenizer."""

    @property
    def name(self) -> str:
        """A short name for people, as stored in headers."""
        ...

    @property
    def vocabulary(self) -> int:
        """Every id is below this."""
        ...

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends a document."""
        ...

    @property
    def hash(self) -> str:
        """32 hex digits that change with anything that changes ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text, without an end-of-document token: text is text, whatever names of tokens stand in it.

        Raises UnicodeEncodeError on lone surrogates.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; end-of-document tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` reads back."""
        ...


def token_dtype(vocabulary: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id below `vocabulary`."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


class ByteTokenizer:
    """Ids 0-255 are the bytes of UTF-8, 256 ends a document."""

    name = "bytes"
    vocabulary = 257
    end_of_document = 256
    hash = xxhash.xxh3_128_hexdigest(b"jaxscale bytes: 0-255 bytes, 256 end of document")

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        # A model may have a larger vocabulary than the tokenizer; an id without a byte shows as U+FFFD.
        unknown = "\ufffd".encode()
        data = b"".join(
            bytes((i,)) if i < 256 else unknown for i in np.asarray(ids).tolist() if i != self.end_of_document
        )
        return data.decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        _save(folder, {"kind": "bytes"})


class FileTokenizer:
    """A `tokenizer.json` run by the `tokenizers` library, without its truncation, padding and added special tokens.

    No text becomes a control token (the end of a document, and what the file calls special but for the unknown token):
    a document that quotes `<|endoftext|>` gets the ids of these 13 characters.
    """

    def __init__(self, text: str, end_of_document: str = "", *, origin: str = _FILE) -> None:
        """`text`: content of the file; `end_of_document`: name of the token that ends a document, empty = find it.

        Raises DataError when the content is no tokenizer, or no end-of-document token is found.
        """
        import tokenizers

        try:
            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
            self._content = json.loads(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{origin} is nothing that the tokenizers library can read ({error}); give a tokenizer.json, or `bytes`"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as ordinary text, where they stand in a text
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{origin} has an empty vocabulary; give a trained tokenizer.json")
        self._text = text
        self.end_of_document_name = _find_end_of_document(vocabulary, end_of_document, origin)
        self.end_of_document = vocabulary[self.end_of_document_name]
        self._control = _control_tokens(self._tokenizer, self._content) | {self.end_of_document}
        self.vocabulary = max(vocabulary.values()) + 1
        self.name = f"{self._content.get('model', {}).get('type', 'tokenizer')}-{self.vocabulary}"
        meaning = {key: value for key, value in self._content.items() if key not in ("truncation", "padding")}
        canonical = json.dumps([_TEXT_IS_TEXT, meaning, self.end_of_document], sort_keys=True)
        self.hash = xxhash.xxh3_128_hexdigest(canonical.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        dtype = token_dtype(self.vocabulary)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        every = [encoding.ids for encoding in encodings]
        return [
            np.array(ids if self._control.isdisjoint(ids) else self._without_control(text), dtype)
            for ids, text in zip(every, texts, strict=True)
        ]

    def _without_control(self, text: str) -> list[int]:
        """Ids of a text in which the model itself finds control tokens (some have their names in the vocabulary).

        The text is cut inside each such name, so that the model never sees one whole. Raises DataError where it cannot.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        cuts = [0]
        for id_, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ not in self._control:
                continue
            if stop - start < 2:
                raise DataError(
                    f"tokenizer {self.name} turns {text[start:stop]!r} in a text into its control token "
                    f"{self._tokenizer.id_to_token(id_)!r}; leave that out of the data, or use another tokenizer"
                )
            cuts.append(start + 1)
        if len(cuts) == 1:
            return encoding.ids
        return [id_ for a, b in itertools.pairwise([*cuts, len(text)]) for id_ in self._without_control(text[a:b])]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        kept = [i for i in np.asarray(ids).tolist() if i != self.end_of_document]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        _save(folder, {"kind": "file", "end_of_document": self.end_of_document_name})
        (Path(folder) / _FILE).write_text(self._text, encoding="utf-8")


def load_tokenizer(spec: str | Path, end_of_document: str = "") -> Tokenizer:
    """The tokenizer of `bytes`, of a `tokenizer.json` file, or of a folder that `save` wrote or that has such a file.

    `end_of_document`: name of the token that ends a document; empty: found by its usual names, or as saved.
    Raises DataError for anything else.
    """
    if spec == "bytes":
        if end_of_document:
            raise DataError(
                f"the tokenizer `bytes` ends documents with id {ByteTokenizer.end_of_document}; "
                f"it has no token {end_of_document!r}: leave data.end-of-document empty"
            )
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        settings = _load_settings(path)
        if settings.get("kind") == "bytes":
            return load_tokenizer("bytes", end_of_document)
        end_of_document = end_of_document or settings.get("end_of_document", "")
        path = path / _FILE
    if not path.is_file():
        raise DataError(
            f"tokenizer {spec or repr('')} is not there; give `bytes`, a tokenizer.json, or a folder with one"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read ({error.strerror}); give a tokenizer.json") from error
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer {path} is not UTF-8 (byte {error.start}); give a tokenizer.json") from error
    return FileTokenizer(text, end_of_document, origin=str(path))


def _control_tokens(tokenizer: tokenizers.Tokenizer, content: dict[str, Any]) -> set[int]:
    """Ids of what the file calls special; not of the unknown token, which stands for text that the model lacks."""
    model = content.get("model", {})
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unknown = model.get("unk_id"), tokenizer.token_to_id(model.get("unk_token") or "")
    return special.difference(unknown)


def _find_end_of_document(vocabulary: dict[str, int], wanted: str, origin: str) -> str:
    if wanted:
        if wanted in vocabulary:
            return wanted
        raise DataError(
            f"{origin} has no token {wanted!r} to end documents with; set data.end-of-document to one it has"
        )
    for name in END_OF_DOCUMENT_NAMES:
        if name in vocabulary:
            return name
    raise DataError(
        f"{origin} has none of the usual end-of-document tokens ({', '.join(END_OF_DOCUMENT_NAMES)}); "
        "name the one to use with --data.end-of-document (or --end-of-document of `jaxscale data build`)"
    )


def _load_settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); save the tokenizer again") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("end_of_document", ""), str):
        raise DataError(f"{path} is damaged (no JSON object, or its end_of_document no text); save the tokenizer again")
    return settings


def _save(folder: str | Path, settings: dict[str, Any]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
