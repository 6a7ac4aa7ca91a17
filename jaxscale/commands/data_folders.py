"""`jaxscale data list`, `verify` and `diff`: looking at token folders. Read next: `data/inspect_corpus.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxscale.cache import cache_folder
from jaxscale.commands.parse import UsageError, parse

DAMAGED = 1
"""Exit code where something is damaged, or two folders differ."""


@dataclass(frozen=True)
class ListCommand:
    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER ...")] = ()
    """Token folders, or folders with some in them; none = the user's cache folder."""


@dataclass(frozen=True)
class VerifyCommand:
    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER ...")] = ()
    """Token folders to read whole."""


@dataclass(frozen=True)
class DiffCommand:
    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER FOLDER")] = ()
    """Two token folders."""


def run_folders(command: str, args: Sequence[str]) -> int:
    """Runs `jaxscale data COMMAND ARGS`. Raises UsageError and DataError."""
    if command == "list":
        return _list(parse(ListCommand, args, prog="jaxscale data list", description=_LIST, examples=""))
    if command == "verify":
        verify = parse(VerifyCommand, args, prog="jaxscale data verify", description=_VERIFY, examples="")
        if not verify.folders:
            raise UsageError("data verify needs folders to read: jaxscale data verify FOLDER...")
        return _verify(verify)
    diff = parse(DiffCommand, args, prog="jaxscale data diff", description=_DIFF, examples="")
    if len(diff.folders) != 2:
        raise UsageError(
            f"data diff compares 2 folders, {len(diff.folders)} are given: jaxscale data diff FOLDER FOLDER"
        )
    return _diff(diff)


_LIST = "Says what token folders there are, and what is in each."
_VERIFY = """Reads token folders whole and names every shard that is not what was built, with the documents in it. The
exit code is 0 only when all of them are sound."""
_DIFF = "Says how two token folders differ: inputs, filters, tokenizer, counts. The exit code is 0 when they do not."


def _list(command: ListCommand) -> int:
    from jaxscale.data.inspect_corpus import token_folders

    cache = cache_folder("data")
    places = [Path(folder) for folder in command.folders] or ([cache] if cache.is_dir() else [])
    lines = [_row(folder) for place in places for folder in token_folders(place)]
    if not lines:
        print(f"no token folder in {', '.join(map(str, places or [cache]))}; make one with `jaxscale data build`")
        return 0
    print("\n".join(line for line, _ in lines))
    return 0 if all(is_readable for _, is_readable in lines) else DAMAGED


def _row(folder: Path) -> tuple[str, bool]:
    """What is said of a folder, and whether it can be read."""
    from jaxscale.data.errors import DataError
    from jaxscale.data.inspect_corpus import BUILDING
    from jaxscale.data.manifest import load_manifest
    from jaxscale.data.token_file import HEADER, open_token_file

    if folder.name.endswith(BUILDING):
        return f"{folder}  unfinished; the same `jaxscale data build` goes on", True
    try:
        header = open_token_file(folder).header
        manifest = load_manifest(folder)
    except DataError as error:
        return f"{folder}  DAMAGED: {error}", False
    built = time.strftime("%Y-%m-%d", time.localtime((folder / HEADER).stat().st_mtime))
    line = (
        f"{folder}  {header.documents:,} documents, {header.tokens:,} tokens ({header.tokenizer_name}), content "
        f"{header.content[:8]}, built {built} from {', '.join(name for name, _ in header.sources[:3])}"
        f"{f' and {len(header.sources) - 3} more' if len(header.sources) > 3 else ''}"
    )
    if manifest is None:
        return f"{line}, without a manifest", True
    dropped, bad = sum(manifest["total"]["dropped"].values()), manifest["total"]["quarantined"]
    return f"{line}{f', {dropped:,} dropped' if dropped else ''}{f', {bad:,} set aside' if bad else ''}", True


def _verify(command: VerifyCommand) -> int:
    from jaxscale.data.inspect_corpus import find_damage
    from jaxscale.data.token_file import load_header
    from jaxscale.data.verified import rebuild_command

    is_sound = True
    for name in command.folders:
        folder = Path(name)
        if found := find_damage(folder):
            is_sound = False
            print("\n".join(found), file=sys.stderr)
            print(f"error: {folder} is damaged ({len(found)} found){rebuild_command(folder)}", file=sys.stderr)
            continue
        header = load_header(folder)
        print(f"{folder}: sound, {header.documents:,} documents, {header.tokens:,} tokens, content {header.content}")
    return 0 if is_sound else DAMAGED


def _diff(command: DiffCommand) -> int:
    from jaxscale.data.inspect_corpus import differences

    lines = differences(*map(Path, command.folders))
    print("\n".join(lines) or "no difference")
    return DAMAGED if lines else 0
