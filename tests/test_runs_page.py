"""docs/runs.md names every field that a line of metrics.jsonl can have, and every event that a plain run writes."""

import ast
from pathlib import Path

from jaxscale.train.evaluate import summarise
from jaxscale.train.metrics import RESERVED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "runs.md").read_text()
INTERNAL = {"part_square", "parts"}
"""Metrics of a step that become others before they are written."""


def written_kinds() -> set[str]:
    """First arguments of the calls that write an event, in code that a run without a supervisor is made of."""
    kinds = set()
    for path in (ROOT / "jaxscale").rglob("*.py"):
        if "supervisor" in path.parts or "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_event = node.func.attr in ("event", "_event", "_say")
                if is_event and node.args and isinstance(node.args[0], ast.Constant):
                    kinds.add(node.args[0].value)
    return kinds


def test_every_field_is_on_the_page():
    fields = RESERVED - INTERNAL | summarise({"loss": 1.0, "tokens": 1.0}, 1.0).keys()
    assert {field for field in fields if f"`{field}`" not in PAGE} == set()


def test_every_event_is_on_the_page():
    table = PAGE.partition("| kind | fields")[2].partition("\n\n")[0]
    shown = {row.split("`")[1] for row in table.splitlines()[2:]}
    assert shown == written_kinds()
