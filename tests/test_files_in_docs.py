"""Files that the documents name exist: a renamed file must not leave a reader searching."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`((?:\.\./)?[a-z_0-9]+(?:/[a-z_0-9]+)+\.py)`")
"""`plan/make.py`, from the root or inside jaxscale/; docs/tour.md also names files beside the supervisor's."""
PLACES = (ROOT, ROOT / "jaxscale", ROOT / "jaxscale" / "supervisor")


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name
)
def test_every_file_that_a_page_names_is_there(page: Path):
    named = set(NAMED.findall(page.read_text()))
    missing = sorted(name for name in named if not any((place / name).is_file() for place in PLACES))
    assert not missing, f"{page.name} names {', '.join(missing)}, which is not in the repository"
