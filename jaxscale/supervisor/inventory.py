"""Which memory slots a host holds, and the best start that all hosts' slots together give.

The agent scans and tells; the coordinator chooses. Headers and tables are checked here, shards when they are loaded.
Read next: `../checkpoint/cover.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxscale.checkpoint.cover import Copy, Damaged, Lineage, choice_to_json, choose
from jaxscale.checkpoint.slot import SlotError, read_slot
from jaxscale.checkpoint.slot_format import table_from_json, table_to_json

OWN, COPIES = "own", "copies"
"""Folders of a host's shared memory: what its worker wrote, and what it keeps for others."""

logger = logging.getLogger(__name__)


def scan(folder: Path, job: str) -> list[dict[str, Any]]:
    """`{"file": NAME, "table": ...}` for every slot below `folder` that can be read; JSON-safe."""
    found = []
    for path in sorted([*folder.glob(f"{OWN}/gen-*"), *folder.glob(f"{COPIES}/*/gen-*")]):
        try:
            found.append({"file": str(path.relative_to(folder)), "table": table_to_json(read_slot(path, job))})
        except SlotError as error:
            logger.info("not a slot that counts: %s", error)
    return found


def copies_of(held: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Copy]:
    """(holder, what `scan` said) -> copies. What cannot be read counts as not there."""
    copies = []
    for holder, entry in held:
        try:
            copies.append(Copy(holder, str(entry["file"]), table_from_json(entry["table"])))
        except (SlotError, KeyError, TypeError) as error:
            logger.warning("%s tells of a slot that is none: %s", holder, error)
    return copies


def best_choice(
    held: Iterable[tuple[str, Mapping[str, Any]]], lineage: Lineage, damaged: Collection[Damaged] = ()
) -> dict[str, Any] | None:
    """The newest step that is complete in memory, as JSON for the workers; None where there is none."""
    choice = choose(copies_of(held), lineage, damaged)
    return choice_to_json(choice) if choice is not None else None
