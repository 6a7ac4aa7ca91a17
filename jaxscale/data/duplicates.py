"""Duplicates: keys of documents, computed where they are tokenised, and who was there first, decided in order.

Exact duplicates have the same text but for space and Unicode form. Near ones have a MinHash (Broder 1997) that agrees
in at least `similarity` of its places with that of an earlier document; which pairs are compared is found by banding
(LSH, Indyk and Motwani 1998). MinHash is rensa's; shingles are runs of 16 bytes, a quarter of them, chosen by hash.

The keys go to append-only files beside the tokens; what is looked up is an index over them in a scratch file
(`seen.py`), made anew by a build that goes on. So memory does not grow with the corpus. On disk a document takes 8
bytes and its place in the index (`exact`), with `near` 512 bytes and a place for each band more. Read next: `seen.py`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from jaxscale.data.errors import DataError
from jaxscale.data.seen import Seen
from jaxscale.data.shingles import byte_windows, mix

PERMUTATIONS = 128
SHINGLE = 16
"""Bytes."""
_EVERY = np.uint64(3)  # a shingle counts where these bits of its hash are 0
_RECALL = 0.9  # of pairs that are exactly as similar as is asked for
_KEY_FILES = {"exact.keys": 8, "minhash.keys": 4 * PERMUTATIONS}
_BATCH = 1 << 14  # documents put into a new index at once


class Keys(NamedTuple):
    """By what documents are recognised."""

    exact: np.ndarray
    """(documents,) uint64."""
    minhash: np.ndarray
    """(documents, 128) uint32; (documents, 0) unless near duplicates are looked for."""


def make_keys(texts: Sequence[str], deduplicate: str) -> Keys:
    """Keys of texts in order; none for `none`. Raises DataError without the library."""
    if deduplicate == "none":
        return Keys(np.empty(0, np.uint64), np.empty((0, 0), np.uint32))
    normal = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
    exact = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in normal], np.uint64)
    if deduplicate != "near" or not texts:
        return Keys(exact, np.empty((len(texts), 0), np.uint32))
    return Keys(exact, _minhash([text.lower().encode() for text in normal]))


def _minhash(texts: Sequence[bytes]) -> np.ndarray:
    check_library()
    import rensa  # type: ignore[import-not-found, import-untyped, unused-ignore]  # an extra

    parts = []
    for text in texts:
        hashes = byte_windows(np.frombuffer(text, np.uint8), SHINGLE)
        chosen = hashes[hashes & _EVERY == 0]
        parts.append(chosen if len(chosen) else np.array([xxhash.xxh3_64_intdigest(text)], np.uint64))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(parts), offsets, PERMUTATIONS, 0)
    return np.array(matrix.to_rows(), np.uint32)


def check_library() -> None:
    """Raises DataError where what finds near duplicates is not installed."""
    try:
        import rensa  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401  # an extra
    except ImportError as error:
        raise DataError(
            "near duplicates are found with rensa, which is not installed: pip install 'jaxscale[duplicates]', or use "
            "--deduplicate exact"
        ) from error


def rows_of_band(similarity: float) -> int:
    """Places of a band: the most, a power of two, with which 0.9 of pairs of this similarity agree in some band."""
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= _RECALL:
            return rows
    return 1


def key_files(deduplicate: str) -> dict[str, int]:
    """Files of keys that a build has, with the bytes of one document in each."""
    return {name: _KEY_FILES[name] for name in list(_KEY_FILES)[: ("none", "exact", "near").index(deduplicate)]}


class Duplicates:
    """Says of each document in turn whether it was there before."""

    def __init__(self, folder: Path, deduplicate: str, similarity: float, count: int = 0) -> None:
        """folder: of the key files, cut back to `count` documents."""
        self.count = count
        self._similarity, self._is_near = similarity, deduplicate == "near"
        self._rows = rows_of_band(similarity)
        self._paths = [folder / name for name in key_files(deduplicate)]
        self.files = [open(path, "ab") for path in self._paths]  # noqa: SIM115  # closed in close
        self._reader = open(self._paths[-1], "rb", buffering=0)  # noqa: SIM115  # closed in close
        self._exact, self._bands = Seen(folder / "exact.index"), Seen(folder / "bands.index")
        for first in range(0, count, _BATCH):
            stop = min(first + _BATCH, count)
            with open(self._paths[0], "rb") as file:
                self._exact.claim(_read(file, first, stop, np.dtype("<u8"), 1)[:, 0], np.arange(first, stop))
            if self._is_near:
                minhash = _read(self._reader, first, stop, np.dtype("<u4"), PERMUTATIONS)
                self._bands.claim(self._band_keys(minhash).ravel(), self._repeated(first, stop))

    def judge(self, keys: Keys) -> np.ndarray:
        """(documents,) int8: 0 = new, 1 = the same as an earlier one, 2 = nearly the same as one. They are noted."""
        first, stop = self.count, self.count + len(keys.exact)
        number = np.arange(first, stop)
        verdict = (self._exact.claim(keys.exact, number) < number).astype(np.int8)
        self.files[0].write(keys.exact.astype("<u8"))
        if self._is_near and len(number):
            self.files[1].write(keys.minhash.astype("<u4"))
            self.files[1].flush()  # they are looked up by their place in the file
            earlier = self._bands.claim(self._band_keys(keys.minhash).ravel(), self._repeated(first, stop))
            earlier = earlier.reshape(len(number), -1)
            for document in np.flatnonzero((earlier < number[:, None]).any(1) & (verdict == 0)):
                candidates = np.unique(earlier[document][earlier[document] < number[document]])
                if any(self._is_similar(keys.minhash[document], int(other)) for other in candidates):
                    verdict[document] = 2
        self.count = stop
        return verdict

    def close(self) -> None:
        """Closes the files and deletes the index."""
        for file in (*self.files, self._reader):
            file.close()
        self._exact.close()
        self._bands.close()

    def remove(self) -> None:
        """Deletes the keys: the build is done."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _is_similar(self, minhash: np.ndarray, other: int) -> bool:
        theirs = _read(self._reader, other, other + 1, np.dtype("<u4"), PERMUTATIONS)[0]
        return float((theirs == minhash).mean()) >= self._similarity

    def _band_keys(self, minhash: np.ndarray) -> np.ndarray:
        """(documents, bands) uint64; bands have keys of their own, so that one index holds all."""
        parts = np.ascontiguousarray(minhash).reshape(len(minhash), -1, self._rows).astype(np.uint64)
        keys = np.broadcast_to(np.arange(1, parts.shape[1] + 1, dtype=np.uint64), parts.shape[:2]).copy()
        for place in range(self._rows):
            keys = mix((keys ^ parts[:, :, place]) + np.uint64(0x9E3779B97F4A7C15))
        return keys

    def _repeated(self, first: int, stop: int) -> np.ndarray:
        return np.repeat(np.arange(first, stop), PERMUTATIONS // self._rows)


def _read(file, first: int, stop: int, dtype: np.dtype, width: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    file.seek(first * width * dtype.itemsize)
    data = file.read((stop - first) * width * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(-1, width)
