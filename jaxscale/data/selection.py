"""Which documents of an input become part of a corpus, and how they are found. Read next: `tokenise.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jaxscale.data.errors import DataError
from jaxscale.data.filters import Filter, parse_filters


@dataclass(frozen=True)
class Selection:
    """What decides, with the input itself, which documents are kept. By itself: every one."""

    text_field: str = "text"
    filters: tuple[Filter, ...] = ()
    """In the order in which they are tried."""
    deduplicate: str = "none"
    """`none`; `exact`: drop what has the text of an earlier document; `near`: also what nearly has."""
    similarity: float = 0.8
    """Share of its MinHash that a near duplicate has in common with an earlier document."""

    def __post_init__(self) -> None:
        if self.deduplicate not in ("none", "exact", "near"):
            raise DataError(f"--deduplicate is {self.deduplicate!r}; use none, exact or near")
        if not 0.3 <= self.similarity <= 1:
            raise DataError(
                f"--similarity is {self.similarity:g}; 0.3 to 1 of a document's MinHash can be compared (below that "
                "nearly everything is similar)"
            )
        names = [one.name for one in self.filters]
        if len(set(names)) < len(names):
            raise DataError(f"the filters {' '.join(names)} name one twice; name each once")

    @property
    def keeps_all(self) -> bool:
        """No document is dropped for what it is."""
        return not self.filters and self.deduplicate == "none"

    def facts(self) -> dict[str, Any]:
        """As plain values; two selections with the same facts keep the same documents."""
        facts: dict[str, Any] = {"text_field": self.text_field, "filters": [one.name for one in self.filters]}
        facts["deduplicate"] = self.deduplicate
        if self.deduplicate == "near":
            facts["similarity"] = self.similarity
        return facts

    def text(self) -> str:
        """What `from_text` reads, for another process."""
        return json.dumps([self.text_field, [one.name for one in self.filters], self.deduplicate, self.similarity])


ALL = Selection()


def from_text(text: str) -> Selection:
    """The selection that `Selection.text` wrote."""
    text_field, filters, deduplicate, similarity = json.loads(text)
    return Selection(text_field, parse_filters(filters), deduplicate, similarity)
