"""`jaxscale data build`: text -> a token folder, once, before training reads it. Read next: `data/build.py`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxscale.commands.parse import UsageError, parse

USAGE = """\
usage: jaxscale data build PATH... --out FOLDER [--tokenizer TOKENIZER.json] [--text-field FIELD]
       [--end-of-document TOKEN] [--workers N]

`jaxscale data build --help` explains the flags. Training builds what it needs by itself, into the user's cache folder;
build by hand what is large, or what many machines shall read.
"""

EXAMPLES = """\
  one file, byte by byte:
    jaxscale data build recipes/data/shakespeare.jsonl.gz --out tokens/shakespeare
  a folder of Parquet with a tokenizer of your own:
    jaxscale data build 'corpus/*.parquet' --text-field content --tokenizer tokenizer.json --out tokens/corpus
  then train on it:
    jaxscale train recipes/lm_tiny.py --data.path tokens/shakespeare
Interrupted? The same command again goes on."""


@dataclass(frozen=True)
class BuildCommand:
    paths: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH ...", help_behavior_hint="(required)")
    ]
    """Files, folders, globs or fsspec addresses of jsonl, text or Parquet, plain or .gz."""
    out: str
    """Folder to make."""
    tokenizer: str = "bytes"
    """`bytes` or the path of a tokenizer.json."""
    end_of_document: str = ""
    """Name of the tokenizer's token that ends a document; empty = found by its usual names."""
    text_field: str = "text"
    """Name of the text column in jsonl and Parquet."""
    workers: int = 0
    """Processes that tokenise; 0 = one per core. The result is the same."""


def run_data(args: Sequence[str], _prog: str | None = None) -> int:
    """Runs `jaxscale data ARGS` and returns the exit code. Raises UsageError and DataError."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] != "build":
        hint = (
            "did you mean `jaxscale data build`?" if difflib.get_close_matches(args[0], ["build"]) else "there is build"
        )
        raise UsageError(f"unknown command 'data {args[0]}'; {hint}")
    command = read(args[1:])
    from jaxscale.data.build import build  # heavy: numpy and the readers
    from jaxscale.data.tokenizer import load_tokenizer

    built = build(
        command.paths,
        command.out,
        load_tokenizer(command.tokenizer, command.end_of_document),
        text_field=command.text_field,
        workers=command.workers,
    )
    header = built.header
    documents = f"{header.documents:,} document{'s' if header.documents != 1 else ''}"
    print(f"{command.out}: {documents}, {header.tokens:,} tokens from {header.bytes:,} bytes of text")
    return 0


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
    return command
