"""docs/supervisor.md shows the states, deadlines, policy and budgets that the program has, and every event."""

import re
from pathlib import Path

from jaxscale.chaos.faults import KINDS
from jaxscale.supervisor.budget import Allowance
from jaxscale.supervisor.policy import ALLOWANCES, HOST, OTHER, RULES
from jaxscale.supervisor.states import DEADLINES, NEXT, State

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "supervisor.md").read_text()
WRITTEN = (
    re.compile(r'\bNote\(\s*"(\w+)"'),
    re.compile(r'\.event\(\s*"(\w+)"'),
    re.compile(r'\bself\._say\("(sealed|alarm)"'),  # of checkpoint/durable.py; agents also `_say`, to the coordinator
)


def block(marker: str) -> list[str]:
    """Lines after `<!-- marker`, up to the next empty line."""
    after = PAGE.split(f"<!-- {marker}:")[1].split("\n", 1)[1]
    return [line for line in after.split("\n\n")[0].splitlines() if not line.startswith("```")]


def table(marker: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block(marker)[2:]]


def test_the_policy_is_that_of_the_program():
    assert table("rules") == [[r.name, r.fault_class, ", ".join(r.remedies), r.why] for r in RULES]


def test_the_diagram_has_every_step_that_is_allowed():
    arrows = [tuple(line.split(" --> ")) for line in map(str.strip, block("states")[1:])]
    shown = {(State(a), State(b)) for a, b in arrows if "[*]" not in (a, b)}
    assert shown == {(a, b) for a, after in NEXT.items() for b in after if b is not State.ESCALATED}
    assert {a for a, after in NEXT.items() if State.ESCALATED in after} == set(State) - {State.DONE, State.ESCALATED}
    assert [b for a, b in arrows if a == "[*]"] == [State.WAITING]


def test_deadlines():
    assert {State(name): float(seconds) for name, seconds in table("deadlines")} == dict(DEADLINES)


def test_budgets():
    shown = {name: Allowance(int(n), int(steps), float(seconds)) for name, n, steps, seconds in table("budgets")}
    assert shown == {**ALLOWANCES, "every other cause": OTHER, "each host": HOST}


def test_kinds_of_faults():
    assert table("kinds") == [[f"`{n}`", "yes" if kind.epochs else "no", kind.about] for n, kind in KINDS.items()]


def test_every_event_that_is_written_is_explained():
    sources = "\n".join(path.read_text() for path in (ROOT / "jaxscale").rglob("*.py"))
    written = {kind for pattern in WRITTEN for kind in pattern.findall(sources)}
    assert {row[0].strip("`") for row in table("events")} == written


def test_files_that_the_page_names_are_there():
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE))
    assert named
    for name in named:
        assert list((ROOT / "jaxscale").rglob(name.removeprefix("jaxscale/"))), name
