"""Builds a token folder from text: streams, uses every core, and goes on where a killed build stopped.

Everything is written into `<folder>.building` beside the target and renamed at the end, so a token folder is either
whole or not there. Every few seconds the data is flushed and a journal says how much of it counts; a later build with
the same inputs cuts the files back to that and goes on, with the same bytes as if it had never stopped. Read next:
`ensure.py`, which builds on demand; `corpus.py`, which reads the result.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from jaxscale.data.errors import DataError
from jaxscale.data.progress import Report, show_progress
from jaxscale.data.sources import START, Cursor, Input, find_inputs, identities, read_blocks
from jaxscale.data.token_file import (
    DOCUMENT_BYTES,
    DOCUMENTS,
    HEADER,
    TOKENIZER,
    TOKENS,
    VERSION,
    Header,
    TokenFile,
    header_text,
    is_token_folder,
    load_header,
    open_token_file,
)
from jaxscale.data.tokenise import Tokenised
from jaxscale.data.tokenizer import Tokenizer, token_dtype
from jaxscale.data.verified import how_to_rebuild, open_verified, remember
from jaxscale.data.workers import tokenise_all

BLOCK_BYTES = 1 << 22
COMMIT_SECONDS = 2.0
WORTH_PROCESSES = 1 << 24  # bytes of input from which starting a process per core pays off
_JOURNAL, _PLAN = "journal.json", "plan.json"
_PLACES = "data.cache or the variable JAXSCALE_CACHE, --out of `jaxscale data build`"
logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Plan:
    """What a build will do; two builds with the same plan make the same bytes."""

    tokenizer: str
    inputs: str
    """Hash of the identities of the inputs and of the text field."""

    @property
    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{VERSION} {self.tokenizer} {self.inputs}".encode())


@dataclass
class _Journal:
    """How much of a half-done build counts."""

    cursor: Cursor = START
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    largest: int = 0


def make_plan(inputs: Sequence[Input], tokenizer: Tokenizer, text_field: str) -> Plan:
    """Reads the inputs (the ends only of large ones) to identify them."""
    what = json.dumps([text_field, *identities(inputs)])
    return Plan(tokenizer.hash, xxhash.xxh3_128_hexdigest(what.encode()))


def build(
    paths: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    workers: int = 0,
    block_bytes: int = BLOCK_BYTES,
    commit_seconds: float = COMMIT_SECONDS,
) -> TokenFile:
    """Turns files, folders and globs of jsonl, text or Parquet (also .gz, also fsspec addresses) into a token folder.

    `workers`: processes that tokenise, 0 = one per core; the result does not depend on it, nor on `block_bytes` (of
    input at once) or `commit_seconds` (between journals). An `out` that holds the same build already is returned.
    Raises DataError for bad input, another tokenizer or other data in `out`, a build that runs already, a full disk;
    then nothing is left behind. What an interrupt or a kill leaves is used by the next build.
    """
    inputs = find_inputs(paths)
    return build_inputs(
        inputs,
        Path(out),
        tokenizer,
        make_plan(inputs, tokenizer, text_field),
        text_field,
        workers=workers,
        block_bytes=block_bytes,
        commit_seconds=commit_seconds,
    )


def build_inputs(
    inputs: Sequence[Input],
    out: Path,
    tokenizer: Tokenizer,
    plan: Plan,
    text_field: str,
    *,
    workers: int = 0,
    block_bytes: int = BLOCK_BYTES,
    commit_seconds: float = COMMIT_SECONDS,
    wait: bool = False,
    replace: bool = False,
) -> TokenFile:
    """`build` of inputs already found and planned. `wait`: for a build of the same folder that runs already.

    `replace`: the folder is ours, in the cache; whatever is wrong with it, it is deleted and built again.
    """
    if out.name in ("", ".."):
        raise DataError(f"--out {str(out)!r} is no folder that can be made; name one that is not there yet")
    with _exclusive(out, wait):
        if out.exists():
            try:
                return _existing(out, plan)
            except DataError as error:
                if not replace:
                    raise DataError(f"{error}{how_to_rebuild(out, error)}") from error
                logger.warning("THE BUILT DATA IN %s IS DAMAGED and is built again: %s", out, error)
                shutil.rmtree(out)
        partial = out.with_name(f"{out.name}.building")
        try:
            journal = _resume(partial, plan, tokenizer)
            is_fresh = journal.documents == 0
            if workers == 0:
                workers = _cores() if sum(source.size for source in inputs) >= WORTH_PROCESSES else 1
            with show_progress(out.name, sum(source.size for source in inputs)) as report:
                blocks = read_blocks(inputs, text_field, block_bytes, journal.cursor)
                results = tokenise_all(blocks, tokenizer, partial / TOKENIZER, text_field, workers)
                content = _write(partial, results, journal, report, commit_seconds, token_dtype(tokenizer.vocabulary))
            _finish(partial, out, journal, inputs, tokenizer, plan, content, is_fresh)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise DataError(
                f"the disk of {out.parent} is full ({error.strerror}); the unfinished build was removed: "
                f"make room or choose another folder ({_PLACES})"
            ) from error
        except DataError as error:
            if not isinstance(error, _KeepPartial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return open_token_file(out)


def _write(
    partial: Path,
    results: Iterator[Tokenised],
    journal: _Journal,
    report: Report,
    commit_seconds: float,
    dtype: np.dtype,
) -> str:
    """Appends all results; returns the content hash."""
    digest = xxhash.xxh3_128()
    for part in _chunks(partial / TOKENS):
        digest.update(part)
    little = dtype.newbyteorder("<")
    with (
        open(partial / TOKENS, "ab") as tokens,
        open(partial / DOCUMENTS, "ab") as offsets,
        open(partial / DOCUMENT_BYTES, "ab") as sizes,
    ):
        if journal.documents == 0:
            _append(offsets, np.zeros(1, "<i8"))
        files = (tokens, offsets, sizes)
        last = time.monotonic()
        for result in results:
            ids = result.tokens.astype(little, copy=False)
            digest.update(ids)
            _append(tokens, ids)
            _append(offsets, (journal.tokens + np.cumsum(result.lengths)).astype("<i8"))
            _append(sizes, result.bytes.astype("<i8"))
            journal.cursor = result.after
            journal.tokens += len(ids)
            journal.documents += len(result.lengths)
            journal.bytes += int(result.bytes.sum())
            journal.largest = max(journal.largest, result.largest)
            report(result.consumed, journal.tokens)
            if time.monotonic() - last >= commit_seconds:
                _commit(partial, files, journal)
                last = time.monotonic()
        _commit(partial, files, journal)
    for part in _chunks(partial / DOCUMENTS):
        digest.update(part)
    return digest.hexdigest()


def _append(file: IO[bytes], values: np.ndarray) -> None:
    file.write(memoryview(values).cast("B") if len(values) else b"")


def _commit(partial: Path, files: Sequence[IO[bytes]], journal: _Journal) -> None:
    """Makes what was appended durable, then says so: a journal never counts bytes that a crash could take back."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    _replace(partial / _JOURNAL, json.dumps(dataclasses.asdict(journal)))


def _finish(
    partial: Path,
    out: Path,
    journal: _Journal,
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    plan: Plan,
    content: str,
    is_fresh: bool,
) -> None:
    if journal.documents == 0:
        raise DataError(
            f"{', '.join(source.address for source in inputs)[:200]} holds no documents; give data with text in it"
        )
    header = Header(
        dtype=token_dtype(tokenizer.vocabulary).name,
        tokens=journal.tokens,
        documents=journal.documents,
        bytes=journal.bytes,
        vocabulary=tokenizer.vocabulary,
        largest_token=journal.largest,
        end_of_document=tokenizer.end_of_document,
        tokenizer_name=tokenizer.name,
        tokenizer_hash=tokenizer.hash,
        content=content,
        plan=plan.hash,
        sources=tuple((os.path.basename(source.address), source.size) for source in inputs),
    )
    _replace(partial / HEADER, header_text(header))
    for name in (_JOURNAL, _PLAN):
        (partial / name).unlink()
    if is_fresh:  # what an interrupted build left has lain on the disk unwatched: its first reader looks at it
        remember(partial)
    os.rename(partial, out)
    _sync_folder(out.parent)


def _resume(partial: Path, plan: Plan, tokenizer: Tokenizer) -> _Journal:
    """The journal of an unfinished build with this plan, its files cut back to it; otherwise a fresh start."""
    try:
        old = Plan(**json.loads((partial / _PLAN).read_bytes()))
    except (OSError, ValueError, TypeError):
        old = None
    if old is not None and old.tokenizer != plan.tokenizer:
        raise _KeepPartial(
            f"{partial} is an unfinished build with another tokenizer; finish it with that one, or delete the folder"
        )
    if old == plan:
        journal = _cut_back(partial, token_dtype(tokenizer.vocabulary).itemsize)
        if journal is not None:
            return journal
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(partial / TOKENIZER)
    _replace(partial / _PLAN, json.dumps(dataclasses.asdict(plan)))
    return _Journal()


def _cut_back(partial: Path, itemsize: int) -> _Journal | None:
    try:
        raw = json.loads((partial / _JOURNAL).read_bytes())
        journal = _Journal(**{**raw, "cursor": Cursor(*raw["cursor"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    wanted = {
        TOKENS: journal.tokens * itemsize,
        DOCUMENTS: (journal.documents + 1) * 8,
        DOCUMENT_BYTES: journal.documents * 8,
    }
    if any(not (partial / name).is_file() or (partial / name).stat().st_size < size for name, size in wanted.items()):
        return None
    for name, size in wanted.items():
        os.truncate(partial / name, size)
    return journal


def _existing(out: Path, plan: Plan) -> TokenFile:
    if not is_token_folder(out):
        raise DataError(f"{out} exists and is no token folder; choose a folder that is not there yet")
    header = load_header(out)
    if header.tokenizer_hash != plan.tokenizer:
        raise DataError(
            f"{out} was built with tokenizer {header.tokenizer_name} ({header.tokenizer_hash[:8]}), not with this one "
            f"({plan.tokenizer[:8]}); tokenizers do not mix in one folder: choose another folder, or delete it"
        )
    if header.plan != plan.hash:
        raise DataError(f"{out} holds other data (or the inputs changed since); choose another folder, or delete it")
    return open_verified(out)


class _KeepPartial(DataError):
    """A refusal that leaves the unfinished build of somebody else alone."""


@contextmanager
def _exclusive(out: Path, wait: bool) -> Iterator[None]:
    """One builder of a folder at a time. The kernel frees the lock of a killed process."""
    import filelock

    path = out.with_name(f".{out.name}.lock")
    lock = filelock.FileLock(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise DataError(
            f"another process is building {out} right now; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        _remove_empty(missing)
        raise DataError(
            f"token files cannot be built in {out.parent}: {error.strerror or error}; choose a folder that can be "
            f"written ({_PLACES})"
        ) from error
    try:
        yield
    except DataError:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone, and makes a new one
        _remove_empty(missing)
        raise
    finally:
        lock.release()


def _remove_empty(folders: Sequence[Path]) -> None:
    """Takes back the folders that a refused build made, the deepest first, up to one that others use by now."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


def _chunks(path: Path) -> Iterator[bytes]:
    if path.exists():
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                yield part


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
