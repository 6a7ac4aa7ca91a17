"""Versions: names for steps that stay what they are, each candidate, canary, production or retired.

`checkpoints/versions.jsonl` is a journal that only grows: a line tags a step, or moves versions from state to state.
What counts is folded from it, so that the history of what ran when is never lost. A version's step
is kept for ever; its manifest's digest is in the journal, so that another save of the same step is not taken for it.
Read next: `promotion.py`, which says what may move where.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from jaxscale.checkpoint.holds import locked
from jaxscale.config_error import ConfigError
from jaxscale.track import lines
from jaxscale.track.jsonl import Appender, backwards

VERSIONS = "versions.jsonl"
State = Literal["candidate", "canary", "production", "retired"]
STATES: tuple[State, ...] = get_args(State)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Evaluation:
    """What a gate compares."""

    loss: float
    """Nats per token of the held-out documents."""
    tokens: float
    """How many; evaluations of other documents are not compared."""


@dataclass(frozen=True)
class Version:
    """A name for a step."""

    name: str
    step: int
    digest: str
    """Of the step's manifest."""
    tagged: float
    """Seconds since 1970."""
    state: State = "candidate"
    evaluation: Evaluation | None = None
    lineage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Registry:
    """All versions of a run, in the order in which they were tagged."""

    versions: Mapping[str, Version] = field(default_factory=dict)
    served: tuple[str, ...] = ()
    """What was production, the present one last; a rollback takes the last one off."""

    @property
    def production(self) -> Version | None:
        return self.versions[self.served[-1]] if self.served else None

    def by_step(self) -> dict[int, list[str]]:
        """Names with their states, for people."""
        found: dict[int, list[str]] = {}
        for version in self.versions.values():
            found.setdefault(version.step, []).append(f"{version.name} ({version.state})")
        return found


def fold(journal: Iterable[Mapping[str, Any]]) -> Registry:
    """The registry that a journal tells of, oldest line first. Lines that make no sense are passed over. Pure."""
    registry = Registry()
    for line in journal:
        try:
            registry = _after(registry, line)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            continue
    return registry


def _after(registry: Registry, line: Mapping[str, Any]) -> Registry:
    versions, served = dict(registry.versions), list(registry.served)
    match line["kind"]:
        case "tagged":
            if line["name"] not in versions:
                versions[check_name(line["name"])] = Version(
                    line["name"],
                    int(line["step"]),
                    str(line["digest"]),
                    float(line["time"]),
                    evaluation=_evaluation(line.get("evaluation")),
                    lineage=dict(line["lineage"]),
                )
        case "moved":
            for name, state in line["moves"]:
                if state not in STATES:
                    raise ValueError(state)
                versions[name] = replace(versions[name], state=state)
                if state == "production" and not line["back"]:
                    served = [one for one in served if one != name] + [name]
            if line["back"]:
                served.pop()
    return Registry(versions, tuple(served))


def read(folder: Path) -> Registry:
    """The versions among a run's checkpoints. Raises OSError."""
    return fold(reversed(list(backwards(folder / VERSIONS))))


def change(folder: Path, decide: Callable[[Registry], list[tuple[str, State]]], **fields: Any) -> Registry:
    """Moves versions as `decide` says of the present ones, while nobody else moves any. Raises what it raises, OSError.

    `fields` go into the journal's line: `back`, whether this is a rollback; the margin; ...
    """
    with locked(folder):
        moves = decide(read(folder))
        if moves:
            _write(folder, "moved", **{"back": False, **fields, "moves": moves})
        return read(folder)


def _write(folder: Path, kind: str, **fields: Any) -> None:
    """Adds a line; it is on the disk when this returns. Raises OSError."""
    appender = Appender(folder / VERSIONS)
    try:
        appender.append(lines.encode({"time": time.time(), "kind": kind, **fields}))
        appender.commit()
    finally:
        appender.close()


def tag(folder: Path, version: Version) -> Version:
    """Adds a version; the same once more changes nothing. Raises ConfigError where the name is another step's."""
    check_name(version.name)
    with locked(folder):  # two who tag at once, and whoever deletes steps
        known = read(folder).versions.get(version.name)
        if known is not None:
            if (known.step, known.digest) == (version.step, version.digest):
                return known
            what = f"step {known.step}" if known.step != version.step else "another save of that step"
            raise ConfigError(f"version {version.name!r} is {what} and stays that; give the new one another name")
        evaluation = version.evaluation
        _write(
            folder,
            "tagged",
            name=version.name,
            step=version.step,
            digest=version.digest,
            evaluation=to_json(evaluation),
            lineage=dict(version.lineage),
        )
        return read(folder).versions[version.name]


def to_json(evaluation: Evaluation | None) -> dict[str, float] | None:
    """An evaluation as a journal has it."""
    return None if evaluation is None else {"loss": evaluation.loss, "tokens": evaluation.tokens}


def evaluation_of(metrics_line: Mapping[str, Any]) -> Evaluation | None:
    """What a step's line of metrics.jsonl says of its evaluation; None where it was not evaluated to the end."""
    try:
        return _evaluation({"loss": metrics_line["eval_loss"], "tokens": metrics_line.get("eval_tokens", 0)})
    except (KeyError, TypeError, ValueError):
        return None


def _evaluation(value: Any) -> Evaluation | None:
    return None if value is None else Evaluation(float(value["loss"]), float(value["tokens"]))


def check_name(name: str) -> str:
    """The name. Raises ConfigError for one that cannot name a folder, or would be read as a step."""
    if not NAME.fullmatch(name) or name.isdigit():
        raise ConfigError(
            f"{name!r} cannot name a version; use letters, digits, '.', '_' and '-', at most 100, not digits alone"
        )
    return name
