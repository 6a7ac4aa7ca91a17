"""A token folder as two streams: documents to train on, and documents held out for evaluation.

A stream is what is left of the flat file when the other's documents are cut out, joined without gaps; a window is S + 1
tokens of it. Held-out documents are chosen by a fixed hash of their number, so they are the same for every run. Read
next: `rows.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.token_file import TokenFile

_CHUNK = 1 << 22  # documents hashed at once


class Stream:
    """Random access to the tokens of some runs of documents, as if nothing lay between them."""

    def __init__(self, file: TokenFile, runs: np.ndarray) -> None:
        """`runs`: (runs, 2) int64, first document and the one after the last of each run; growing, not overlapping."""
        self._tokens, self._offsets = file.tokens, file.offsets
        first, stop = file.offsets[runs[:, 0]], file.offsets[runs[:, 1]]
        ends = np.cumsum(stop - first)
        self._starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])  # of each run, in the stream
        self._ends = ends
        self._shift = first - self._starts  # place in the file minus place in the stream
        self.documents = int((runs[:, 1] - runs[:, 0]).sum())
        self.length = int(ends[-1])
        """Tokens."""
        self._document_bytes, self._runs = file.document_bytes, runs
        self._folder, self._vocabulary = file.folder, file.header.vocabulary

    @property
    def bytes(self) -> int:
        """Text of the documents in UTF-8 bytes. Reads the lengths of all of them."""
        return int(sum(self._document_bytes[a:b].sum() for a, b in self._runs))

    def windows(self, sequence: int) -> int:
        """How many windows of `sequence` tokens and their targets fit; each starts where the last one ended."""
        return max(self.length - 1, 0) // sequence

    def targets(self, sequence: int) -> int:
        """Tokens that the windows predict: all but the first of each document, of what fits into whole windows."""
        end = self.windows(sequence) * sequence  # the last target of the last window; the first token is none
        run = int(np.searchsorted(self._ends, end, "right"))
        first, place = int(self._runs[run, 0]), int(end + self._shift[run])
        whole = int((self._runs[:run, 1] - self._runs[:run, 0]).sum())
        return end + 1 - whole - int(np.searchsorted(self._offsets, place, "right") - first)

    def gather(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, length) int32 from each of `starts` (B,), and (B, length) bool: True where a document starts."""
        starts = np.asarray(starts, np.int64)
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.length):
            raise IndexError(
                f"windows of {length} at {starts.min()}..{starts.max()} in a stream of {self.length} tokens"
            )
        row, column, place, count = self._pieces(starts, length)
        tokens = np.empty((len(starts), length), np.int32)
        for r, c, p, n in zip(row.tolist(), column.tolist(), place.tolist(), count.tolist(), strict=True):
            tokens[r, c : c + n] = self._tokens[p : p + n]
        # The file was verified when it was opened; this is for one that somebody writes to while it is being read.
        if tokens.size and int(tokens.view(np.uint32).max()) >= self._vocabulary:
            raise DamagedData(
                f"{self._folder} has token id {int(tokens.view(np.uint32).max())} beyond its vocabulary of "
                f"{self._vocabulary}, although it was whole when it was opened; something writes to it: stop that, and "
                "start again"
            )
        first = np.searchsorted(self._offsets, place, "left")
        documents = np.searchsorted(self._offsets, place + count, "left") - first
        piece = np.repeat(np.arange(len(place)), documents)
        number = np.arange(len(piece)) - np.repeat(np.cumsum(documents) - documents, documents)
        at = self._offsets[first[piece] + number]
        document_starts = np.zeros((len(starts), length), bool)
        document_starts[row[piece], column[piece] + at - place[piece]] = True
        return tokens, document_starts

    def _pieces(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The unbroken stretches of the file that the windows are made of: row, column, place in the file, length."""
        first = np.searchsorted(self._starts, starts, "right") - 1
        last = np.searchsorted(self._starts, starts + (length - 1), "right") - 1
        runs = last - first + 1
        row = np.repeat(np.arange(len(starts)), runs)
        run = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(runs) - runs, runs)
        begin = np.maximum(starts[row], self._starts[run])
        end = np.minimum(starts[row] + length, self._ends[run])
        return row, begin - starts[row], begin + self._shift[run], end - begin


@dataclass(frozen=True)
class Corpus:
    """One source of a mixture, open."""

    address: str
    file: TokenFile
    train: Stream
    held_out: Stream | None

    @property
    def content(self) -> str:
        """Content hash of the tokens: the corpus's identity wherever it lies."""
        return self.file.header.content

    def check_sequence(self, sequence: int) -> None:
        """Raises DataError when there is not one window to train on, or nothing to predict in any."""
        if self.train.windows(sequence) == 0:
            held = self.file.header.documents - self.train.documents
            raise DataError(
                f"corpus {self.address} has {self.train.length} tokens to train on ({held} documents are held out); "
                f"one sequence of {sequence} takes {sequence + 1}: give more data or a smaller data.sequence"
            )
        if self.train.targets(sequence) == 0:
            raise DataError(
                f"corpus {self.address} has nothing to learn from: no row of {sequence} tokens has one to predict; "
                f"its {self.train.documents} documents are empty, and a document's first token is never predicted: "
                "give data with text in it"
            )


def held_out_documents(documents: int, count: int) -> np.ndarray:
    """(count,) int64: the documents with the smallest hash of their number, in growing order. The same in every run."""
    if count == 0:
        return np.empty(0, np.int64)
    best_hash, best = np.empty(0, np.uint64), np.empty(0, np.int64)
    for start in range(0, documents, _CHUNK):
        number = np.arange(start, min(start + _CHUNK, documents), dtype=np.int64)
        best_hash, best = np.concatenate([best_hash, _mix(number)]), np.concatenate([best, number])
        order = np.argsort(best_hash, kind="stable")[:count]
        best_hash, best = best_hash[order], best[order]
    return np.sort(best)


def open_corpus(address: str, file: TokenFile, held_out: int) -> Corpus:
    """Splits a token folder by document. Raises DataError when nothing would be left to train on."""
    documents = file.header.documents
    if held_out >= documents:
        raise DataError(
            f"corpus {address} has {documents} documents, data.held-out-documents asks for {held_out} of them; "
            f"hold out at most {documents - 1}"
        )
    held = held_out_documents(documents, held_out)
    borders = np.concatenate([np.full(1, -1), held, np.full(1, documents)])
    kept = np.stack([borders[:-1] + 1, borders[1:]], axis=1)
    kept = kept[kept[:, 0] < kept[:, 1]]
    evaluate = Stream(file, np.stack([held, held + 1], axis=1)) if held_out else None
    return Corpus(address, file, Stream(file, kept), evaluate)


def _mix(number: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): uint64 hashes without visible order."""
    x = number.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
