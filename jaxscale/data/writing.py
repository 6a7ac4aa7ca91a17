"""Appends what was tokenised to the files of a build, without what is dropped, and keeps the journal.

Read next: `build.py`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from jaxscale.data.blocks import Problem
from jaxscale.data.duplicates import Duplicates
from jaxscale.data.errors import DataError
from jaxscale.data.journal import JOURNAL, QUARANTINE, Journal
from jaxscale.data.progress import Report
from jaxscale.data.selection import Selection
from jaxscale.data.shards import ShardDigests, chunks, digest_file
from jaxscale.data.tally import REASONS
from jaxscale.data.token_file import DOCUMENT_BYTES, DOCUMENTS, TOKENS
from jaxscale.data.tokenise import Places, Tokenised

_COMMIT_SHARE = 20  # a commit that takes a second makes the next one come later by so many of the seconds asked for
_SHOWN_PROBLEMS = 5
logger = logging.getLogger(__name__)


class KeepPartial(DataError):
    """A refusal that leaves the unfinished build alone: it is somebody else's, or can go on."""


class Writer:
    """Appends what was tokenised to the files of a build, without what was there before, and keeps the journal."""

    def __init__(self, partial: Path, journal: Journal, dtype: np.dtype, selection: Selection, max_bad: int) -> None:
        self._partial, self._journal, self._dtype = partial, journal, dtype.newbyteorder("<")
        self._selection, self._max_bad = selection, max_bad

    def write(
        self, results: Iterator[Tokenised], report: Report, commit_seconds: float
    ) -> tuple[str, dict[str, ShardDigests]]:
        """Returns the content hash and the digests of what was written."""
        partial, journal = self._partial, self._journal
        digest, shards = xxhash.xxh3_128(), ShardDigests()
        for part in chunks(partial / TOKENS):
            digest.update(part)
            shards.update(part)
        with ExitStack() as stack:
            names = (TOKENS, DOCUMENTS, DOCUMENT_BYTES, QUARANTINE)
            files = [stack.enter_context(open(partial / name, "ab")) for name in names]
            duplicates = None
            if self._selection.deduplicate != "none":
                duplicates = Duplicates(
                    partial, self._selection.deduplicate, self._selection.similarity, journal.judged
                )
                stack.callback(duplicates.close)
            durable = [*files, *(duplicates.files if duplicates else [])]
            if journal.is_fresh:
                _append(files[1], np.zeros(1, "<i8"))
            last, pause = time.monotonic(), commit_seconds
            for result in results:
                self._set_aside(files[3], result.problems)
                for reason, places in result.refused:
                    journal.tally.drop(reason, places)
                result = result if duplicates is None else self._without_duplicates(result, duplicates)
                ids = result.tokens.astype(self._dtype, copy=False)
                digest.update(ids)
                shards.update(ids)
                _append(files[0], ids)
                _append(files[1], (journal.tokens + np.cumsum(result.lengths)).astype("<i8"))
                _append(files[2], result.bytes.astype("<i8"))
                journal.tally.keep(result.places, result.lengths, result.bytes)
                journal.cursor = result.after
                journal.tokens += len(ids)
                journal.documents += len(result.lengths)
                journal.bytes += int(result.bytes.sum())
                journal.largest = max(journal.largest, result.largest)
                report(result.consumed, journal.tokens)
                now = time.monotonic()
                if now - last >= pause:
                    _commit(partial, durable, journal)
                    last = time.monotonic()
                    pause = commit_seconds * (1 + _COMMIT_SHARE * (last - now))  # the tally of many inputs is long
            _commit(partial, durable, journal)
        for part in chunks(partial / DOCUMENTS):
            digest.update(part)
        others = {name: digest_file(partial / name) for name in (DOCUMENTS, DOCUMENT_BYTES, QUARANTINE)}
        return digest.hexdigest(), {TOKENS: shards, **others}

    def _set_aside(self, file: IO[bytes], problems: Sequence[Problem]) -> None:
        """Notes records that cannot be used. Raises DataError when they are too many."""
        journal = self._journal
        if journal.quarantined + len(problems) > self._max_bad:
            if not self._max_bad:
                raise DataError(problems[0].message)
            shown = "; ".join(problem.message for problem in problems[:_SHOWN_PROBLEMS])
            raise KeepPartial(
                f"more than {self._max_bad} records cannot be used (--max-bad). {journal.quarantined} before were set "
                f"aside, next come: {shown}. What is built so far stays in {self._partial}: with a larger --max-bad "
                "the same command goes on"
            )
        for problem in problems:
            line = {"input": problem.input, "record": problem.record, "lost": problem.lost, "why": problem.message}
            data = (json.dumps(line) + "\n").encode()
            file.write(data)
            journal.quarantine += len(data)
            journal.quarantined += 1
            if journal.quarantined <= _SHOWN_PROBLEMS:
                logger.warning("set aside: %s", problem.message)
            elif journal.quarantined == _SHOWN_PROBLEMS + 1:
                logger.warning("further records that cannot be used are listed in %s only", QUARANTINE)
        journal.tally.quarantine(problems)

    def _without_duplicates(self, result: Tokenised, duplicates: Duplicates) -> Tokenised:
        verdict = duplicates.judge(result.keys)
        self._journal.judged = duplicates.count
        if not verdict.any():
            return result
        for number in range(1, len(REASONS)):
            dropped = verdict == number
            self._journal.tally.drop(REASONS[number], Places(*(values[dropped] for values in result.places)))
        kept = verdict == 0
        tokens = result.tokens[np.repeat(kept, result.lengths)]
        return result._replace(
            tokens=tokens,
            lengths=result.lengths[kept],
            bytes=result.bytes[kept],
            places=Places(*(values[kept] for values in result.places)),
            largest=int(tokens.max()) if len(tokens) else 0,
        )


def _append(file: IO[bytes], values: np.ndarray) -> None:
    file.write(memoryview(values).cast("B") if len(values) else b"")


def _commit(partial: Path, files: Sequence[IO[bytes]], journal: Journal) -> None:
    """Makes what was appended durable, then says so: a journal never counts bytes that a crash could take back."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    replace_text(partial / JOURNAL, journal.text())


def replace_text(path: Path, text: str) -> None:
    """Writes a file durably, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
