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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from jaxscale.data import journal as journals
from jaxscale.data import manifest as manifests
from jaxscale.data.duplicates import check_library, key_files
from jaxscale.data.errors import DataError
from jaxscale.data.journal import JOURNAL, QUARANTINE, Journal
from jaxscale.data.one_builder import PLACES, exclusive
from jaxscale.data.progress import show_progress
from jaxscale.data.reading import read_blocks
from jaxscale.data.selection import ALL, Selection
from jaxscale.data.shards import ShardDigests
from jaxscale.data.sources import Input, find_inputs, identities, modified
from jaxscale.data.token_file import (
    HEADER,
    TOKENIZER,
    VERSION,
    Header,
    TokenFile,
    header_text,
    is_token_folder,
    load_header,
    open_token_file,
)
from jaxscale.data.tokenizer import Tokenizer, token_dtype
from jaxscale.data.verified import how_to_rebuild, open_verified, remember
from jaxscale.data.workers import tokenise_all
from jaxscale.data.writing import KeepPartial, Writer, replace_text

BLOCK_BYTES = 1 << 22
COMMIT_SECONDS = 2.0
WORTH_PROCESSES = 1 << 24  # bytes of input from which starting a process per core pays off
_PLAN = "plan.json"
logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Plan:
    """What a build will do; two builds with the same plan make the same bytes."""

    tokenizer: str
    inputs: str
    """Hash of the identities of the inputs and of the selection."""

    @property
    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"{VERSION} {self.tokenizer} {self.inputs}".encode())


def make_plan(inputs: Sequence[Input], tokenizer: Tokenizer, selection: Selection | str = ALL) -> Plan:
    """Reads the inputs (the ends only of large ones) to identify them. A str is the text field of all documents."""
    selection = Selection(selection) if isinstance(selection, str) else selection
    what = [selection.text_field, *identities(inputs)]
    if not selection.keeps_all:
        what.append(json.dumps(selection.facts()))
    return Plan(tokenizer.hash, xxhash.xxh3_128_hexdigest(json.dumps(what).encode()))


def build(
    paths: Sequence[str],
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    selection: Selection | None = None,
    max_bad: int = 0,
    workers: int = 0,
    block_bytes: int = BLOCK_BYTES,
    commit_seconds: float = COMMIT_SECONDS,
) -> TokenFile:
    """Turns files, folders, globs and fsspec addresses of the formats in `sources.ENDINGS` into a token folder.

    `selection`: which documents are kept (with a text field of its own). `max_bad`: records that cannot be used are set
    aside, up to so many. `workers`: processes that tokenise, 0 = one per core; the result does not depend on it, nor on
    `block_bytes` (of input at once) or `commit_seconds` (between journals). An `out` that holds the same build already
    is returned. Raises DataError for bad input, another tokenizer or other data in `out`, a build that runs already, a
    full disk; then nothing is left behind, unless `max_bad` allowed some bad records and there were more: then the
    same build with a larger `max_bad` goes on. What an interrupt or a kill leaves is used by the next build.
    """
    inputs = find_inputs(paths)
    selection = selection or Selection(text_field)
    return build_inputs(
        inputs,
        Path(out),
        tokenizer,
        make_plan(inputs, tokenizer, selection),
        selection,
        max_bad=max_bad,
        workers=workers,
        block_bytes=block_bytes,
        commit_seconds=commit_seconds,
    )


def build_inputs(
    inputs: Sequence[Input],
    out: Path,
    tokenizer: Tokenizer,
    plan: Plan,
    selection: Selection,
    *,
    max_bad: int = 0,
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
    if selection.deduplicate == "near":
        check_library()
    with exclusive(out, wait):
        if out.exists():
            try:
                return _existing(out, plan, max_bad)
            except DataError as error:
                if not replace:
                    raise DataError(f"{error}{how_to_rebuild(out, error)}") from error
                logger.warning("THE BUILT DATA IN %s IS DAMAGED and is built again: %s", out, error)
                shutil.rmtree(out)
        partial = out.with_name(f"{out.name}.building")
        try:
            before = [modified(source) for source in inputs]
            journal = _resume(partial, plan, tokenizer, selection)
            is_fresh = journal.is_fresh
            if workers == 0:
                workers = _cores() if sum(source.size for source in inputs) >= WORTH_PROCESSES else 1
            with show_progress(out.name, sum(source.size for source in inputs)) as report:
                blocks = read_blocks(inputs, selection.text_field, block_bytes, journal.cursor)
                results = tokenise_all(blocks, tokenizer, partial / TOKENIZER, selection, workers)
                writer = Writer(partial, journal, token_dtype(tokenizer.vocabulary), selection, max_bad)
                content, shards = writer.write(results, report, commit_seconds)
            for source, was in zip(inputs, before, strict=True):
                if modified(source) != was:
                    raise DataError(f"{source.address} was changed while it was read; leave it alone and build again")
            _finish(partial, out, journal, inputs, tokenizer, plan, selection, content, shards, is_fresh)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise DataError(
                f"the disk of {out.parent} is full ({error.strerror}); the unfinished build was removed: "
                f"make room or choose another folder ({PLACES})"
            ) from error
        except DataError as error:
            if not isinstance(error, KeepPartial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return open_token_file(out)


def _finish(
    partial: Path,
    out: Path,
    journal: Journal,
    inputs: Sequence[Input],
    tokenizer: Tokenizer,
    plan: Plan,
    selection: Selection,
    content: str,
    shards: dict[str, ShardDigests],
    is_fresh: bool,
) -> None:
    if journal.documents == 0:
        why = "holds no documents"
        if dropped := journal.tally.total.dropped:
            why = f"has no document left ({', '.join(f'{name} dropped {count:,}' for name, count in dropped.items())})"
        raise DataError(f"{', '.join(source.address for source in inputs)[:200]} {why}; give data with text in it")
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
    replace_text(partial / HEADER, header_text(header))
    digests = manifests.digest_inputs(inputs)
    files = {**shards, **manifests.digest_small_files(partial)}
    replace_text(
        partial / manifests.MANIFEST,
        manifests.text(manifests.make_manifest(header, inputs, digests, selection, journal.tally, files)),
    )
    for name in (JOURNAL, _PLAN, *key_files(selection.deduplicate)):
        (partial / name).unlink()
    if is_fresh:  # what an interrupted build left has lain on the disk unwatched: its first reader looks at it
        remember(partial)
    os.rename(partial, out)
    _sync_folder(out.parent)


def _resume(partial: Path, plan: Plan, tokenizer: Tokenizer, selection: Selection) -> Journal:
    """The journal of an unfinished build with this plan, its files cut back to it; otherwise a fresh start."""
    try:
        old = Plan(**json.loads((partial / _PLAN).read_bytes()))
    except (OSError, ValueError, TypeError):
        old = None
    if old is not None and old.tokenizer != plan.tokenizer:
        raise KeepPartial(
            f"{partial} is an unfinished build with another tokenizer; finish it with that one, or delete the folder"
        )
    if old == plan and (journal := journals.load(partial)) is not None:
        keys = key_files(selection.deduplicate)
        if journals.cut_back(partial, journal, token_dtype(tokenizer.vocabulary).itemsize, keys):
            return journal
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(partial / TOKENIZER)
    replace_text(partial / _PLAN, json.dumps(dataclasses.asdict(plan)))
    return Journal()


def _existing(out: Path, plan: Plan, max_bad: int) -> TokenFile:
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
    file = open_verified(out)
    manifest = manifests.load_manifest(out)
    quarantined = manifest["total"]["quarantined"] if manifest else 0
    if quarantined > max_bad:
        raise DataError(
            f"{out} is there, built without {quarantined} bad records ({out / QUARANTINE} lists them), which is more "
            f"than {max_bad} (--max-bad); allow so many, or correct the input and delete the folder"
        )
    return file


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
