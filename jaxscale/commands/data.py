"""`jaxscale data build`: text -> a token folder, once, before training reads it; and `data` commands to look at them.

Read next: `data/build.py`; `data_folders.py`, the other commands.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxscale.commands.parse import UsageError, parse

if TYPE_CHECKING:
    from jaxscale.data.manifest import Manifest

COMMANDS = ("build", "list", "verify", "diff")

USAGE = """\
usage: jaxscale data build PATH... --out FOLDER [--tokenizer TOKENIZER.json] [--text-field FIELD]
       [--end-of-document TOKEN] [--filters FILTER...] [--deduplicate exact|near] [--max-bad N] [--workers N]
       jaxscale data list [FOLDER...]
       jaxscale data verify FOLDER...
       jaxscale data diff FOLDER FOLDER

`jaxscale data build --help` explains the flags. Training builds what it needs by itself, into the user's cache folder;
build by hand what is large, what many machines shall read, or what is to be filtered.
"""

EXAMPLES = """\
  one file, byte by byte:
    jaxscale data build recipes/data/shakespeare.jsonl.gz --out tokens/shakespeare
  a folder of Parquet with a tokenizer of your own:
    jaxscale data build 'corpus/*.parquet' --text-field content --tokenizer tokenizer.json --out tokens/corpus
  without duplicates, short documents and tables of numbers, and without at most 100 records that are broken:
    jaxscale data build 'corpus/*.jsonl.gz' --filters min-characters=200 max-digit-share=0.4 --deduplicate near
      --max-bad 100 --out tokens/corpus
  then train on it:
    jaxscale train recipes/lm_tiny.py --data.path tokens/shakespeare
Interrupted? The same command again goes on."""


@dataclass(frozen=True)
class BuildCommand:
    paths: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH ...", help_behavior_hint="(required)")
    ]
    """Files, folders, globs or fsspec addresses of jsonl, text, Parquet, WebDataset tar, TFRecord or ArrayRecord."""
    out: str
    """Folder to make."""
    tokenizer: str = "bytes"
    """`bytes` or the path of a tokenizer.json."""
    end_of_document: str = ""
    """Name of the tokenizer's token that ends a document; empty = found by its usual names."""
    text_field: str = "text"
    """Name of the text in jsonl, Parquet and records."""
    filters: tuple[str, ...] = ()
    """Documents to keep: min- or max-, a measure, = and a limit. Measures: characters, symbol-share, digit-share,
    repeated-lines, repeated-text (shares from 0 to 1), longest-line."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Drop documents that were there before: `exact` = the same text, `near` = also nearly the same (MinHash)."""
    similarity: float = 0.8
    """For `near`: share of the MinHash that is the same."""
    max_bad: int = 0
    """Records that cannot be used are set aside and listed, up to so many; 0 = the first one ends the build."""
    workers: int = 0
    """Processes that tokenise; 0 = one per core. The result is the same."""


def run_data(args: Sequence[str], _prog: str | None = None) -> int:
    """Runs `jaxscale data ARGS` and returns the exit code. Raises UsageError and DataError."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        hint = f"did you mean `jaxscale data {near[0]}`?" if near else f"there are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command 'data {args[0]}'; {hint}")
    if args[0] == "build":
        return _build(read(args[1:]))
    from jaxscale.commands.data_folders import run_folders

    return run_folders(args[0], args[1:])


def _build(command: BuildCommand) -> int:
    from jaxscale.data.build import build  # heavy: numpy and the readers
    from jaxscale.data.filters import parse_filters
    from jaxscale.data.manifest import load_manifest
    from jaxscale.data.selection import Selection
    from jaxscale.data.tokenizer import load_tokenizer

    filters = parse_filters(command.filters)
    built = build(
        command.paths,
        command.out,
        load_tokenizer(command.tokenizer, command.end_of_document),
        selection=Selection(command.text_field, filters, command.deduplicate, command.similarity),
        max_bad=command.max_bad,
        workers=command.workers,
    )
    header = built.header
    documents = f"{header.documents:,} document{'s' if header.documents != 1 else ''}"
    print(f"{command.out}: {documents}, {header.tokens:,} tokens from {header.bytes:,} bytes of text")
    if manifest := load_manifest(built.folder):
        print("".join(f"{line}\n" for line in report(manifest)), end="")
    return 0


def report(manifest: Manifest) -> list[str]:
    """What was dropped or set aside, why, and the first of each; nothing where everything was kept."""
    total, examples = manifest["total"], manifest["examples"]
    lines = []
    read = total["documents"] + total["quarantined"] + sum(total["dropped"].values())
    if total["dropped"]:
        lines.append(f"  dropped {sum(total['dropped'].values()):,} of {read:,} documents:")
        for reason, count in total["dropped"].items():
            shown = ", ".join(place(one["input"], one["record"]) for one in examples[reason])
            lines.append(f"    {reason:<26} {count:>12,}   {shown}{', ...' if count > len(examples[reason]) else ''}")
    if total["quarantined"]:
        lost = f", with {total['lost']:,} bytes of input that were not read" if total["lost"] else ""
        lines.append(
            f"  set aside {total['quarantined']:,} of {read:,} records as unusable{lost}: see quarantine.jsonl"
        )
        for parent in manifest["parents"]:
            if parent["quarantined"]:
                lines.append(f"    {parent['name']:<26} {parent['quarantined']:>12,}")
    return lines


def place(name: str, record: int) -> str:
    """Of a record, as it is shown."""
    return f"{name}:{record}" if record else name


def read(args: Sequence[str]) -> BuildCommand:
    """The flags of `data build`. Raises UsageError, and SystemExit(0) after `--help`."""
    command = parse(
        BuildCommand,
        args,
        prog="jaxscale data build",
        description="Turns text into a folder of token files with a content hash, which training reads at random.",
        examples=EXAMPLES,
    )
    if not command.paths:
        raise UsageError("data build needs files to read: jaxscale data build PATH... --out FOLDER")
    if command.workers < 0:
        raise UsageError(f"--workers is {command.workers}; use 0 for one process per core")
    if command.max_bad < 0:
        raise UsageError(f"--max-bad is {command.max_bad}; use 0 to accept none")
    return command
