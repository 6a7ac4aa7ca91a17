"""How much of a half-done build counts, and cutting its files back to that. Read next: `build.py`, which goes on there.

The order of a commit: everything appended is made durable, then the journal is replaced. So it never counts bytes that
a crash could take back.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxscale.data import tally as tallies
from jaxscale.data.blocks import START, Cursor
from jaxscale.data.tally import Tally
from jaxscale.data.token_file import DOCUMENT_BYTES, DOCUMENTS, TOKENS

JOURNAL, QUARANTINE = "journal.json", "quarantine.jsonl"


@dataclass
class Journal:
    cursor: Cursor = START
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    largest: int = 0
    judged: int = 0
    """Documents whose keys are kept, to find duplicates of them."""
    quarantine: int = 0
    """Bytes of the list of bad records."""
    quarantined: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def is_fresh(self) -> bool:
        return self.cursor == START

    def text(self) -> str:
        """What `load` reads."""
        raw = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "tally"}
        return json.dumps({**raw, "tally": tallies.encode(self.tally)})


def load(partial: Path) -> Journal | None:
    """The journal of an unfinished build; None where there is none that can be read."""
    try:
        raw = json.loads((partial / JOURNAL).read_bytes())
        return Journal(**{**raw, "cursor": Cursor(*raw["cursor"]), "tally": tallies.decode(raw["tally"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def cut_back(partial: Path, journal: Journal, itemsize: int, keys: Mapping[str, int]) -> bool:
    """Cuts what is appended to back to the journal. False: something that counts is missing, and nothing was cut.

    itemsize: bytes of a token; keys: file name -> bytes per judged document.
    """
    wanted = {
        TOKENS: journal.tokens * itemsize,
        DOCUMENTS: (journal.documents + 1) * 8,
        DOCUMENT_BYTES: journal.documents * 8,
        QUARANTINE: journal.quarantine,
        **{name: journal.judged * size for name, size in keys.items()},
    }
    paths = {name: partial / name for name in wanted}
    if any(not path.is_file() or path.stat().st_size < wanted[name] for name, path in paths.items()):
        return False
    for name, path in paths.items():
        os.truncate(path, wanted[name])
    return True
