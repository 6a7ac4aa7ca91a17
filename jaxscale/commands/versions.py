"""`jaxscale checkpoints tag|versions|promote|retire|rollback|card RUN`: which step is used for what.

Read next: `../checkpoint/versions.py`, `../checkpoint/promotion.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxscale.commands.checkpoints import read
from jaxscale.commands.parse import UsageError
from jaxscale.commands.wording import table
from jaxscale.terminal import visible

if TYPE_CHECKING:
    from jaxscale.checkpoint.place import Place
    from jaxscale.checkpoint.versions import Registry, Version

Word = Annotated[str, tyro.conf.Positional]

TAG_EXAMPLES = """\
  jaxscale checkpoints tag runs/mine 400 v1
  jaxscale checkpoints tag runs/mine 800 v2 --eval-loss 2.31 --eval-tokens 100000
The step is read and verified first. A name stays that step's for ever, and the step is never pruned."""
VERSIONS_EXAMPLES = """\
  jaxscale checkpoints versions runs/mine
  jaxscale checkpoints versions runs/mine --json      with where each comes from"""
PROMOTE_EXAMPLES = """\
  jaxscale checkpoints promote runs/mine v2                  candidate -> canary
  jaxscale checkpoints promote runs/mine v2                  canary -> production; the one before is retired
  jaxscale checkpoints promote runs/mine v2 --margin 0.05    it may be worse than production by so much"""
RETIRE_EXAMPLES = "  jaxscale checkpoints retire runs/mine v2"
ROLLBACK_EXAMPLES = """\
  jaxscale checkpoints rollback runs/mine       what was in production before is again, the present one is retired"""
CARD_EXAMPLES = """\
  jaxscale checkpoints card runs/mine v2 > MODEL_CARD.md"""


@dataclass(frozen=True)
class TagCommand:
    run: Annotated[Word, tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    step: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """One of its checkpoints."""
    name: Annotated[Word, tyro.conf.arg(metavar="NAME")]
    """Of the version: letters, digits, '.', '_' and '-'."""
    eval_loss: float | None = None
    """Of an evaluation made elsewhere, nats per token; none = the one that training made after that step."""
    eval_tokens: int = 0
    """On how many tokens; evaluations on other numbers are not compared."""


@dataclass(frozen=True)
class VersionsCommand:
    run: Annotated[Word, tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """A JSON array in place of the table."""


@dataclass(frozen=True)
class PromoteCommand:
    run: Annotated[Word, tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    name: Annotated[Word, tyro.conf.arg(metavar="NAME")]
    """Of the version that moves up one stage."""
    margin: float = 0.01
    """How much worse than production its evaluation may be, nats per token."""


@dataclass(frozen=True)
class RetireCommand:
    run: Annotated[Word, tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    name: Annotated[Word, tyro.conf.arg(metavar="NAME")]
    """Of a version that is not in production."""


@dataclass(frozen=True)
class RollbackCommand:
    run: Annotated[Word, tyro.conf.arg(metavar="RUN")]
    """Run directory."""


@dataclass(frozen=True)
class CardCommand:
    run: Annotated[Word, tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    name: Annotated[Word, tyro.conf.arg(metavar="NAME")]
    """Of the version."""


def run_tag(args: Sequence[str]) -> int:
    """`checkpoints tag`: 0, or 1 where the step is damaged or a further location was not told."""
    command = read(TagCommand, "tag", args, "Gives a checkpoint a name that it keeps.", TAG_EXAMPLES)
    if (command.eval_loss is not None and not math.isfinite(command.eval_loss)) or command.eval_tokens < 0:
        raise UsageError("--eval-loss is a number, and --eval-tokens 0 or more")
    from jaxscale.checkpoint import versions
    from jaxscale.checkpoint.holds import holding
    from jaxscale.checkpoint.lineage import digest_of, lineage_of
    from jaxscale.checkpoint.versions import Evaluation, Version

    place, run = _opened(command.run, "tag")
    versions.check_name(command.name)
    with holding(run / "checkpoints", command.step, "checkpoints tag"):
        place.known(command.step)
        _check_whole(place, command.step)
        evaluation = _evaluation_of(run, command.step)
        if command.eval_loss is not None:
            evaluation = Evaluation(command.eval_loss, command.eval_tokens)
        lineage, digest = lineage_of(run, command.step), digest_of(run, command.step)
        new = Version(command.name, command.step, digest, 0.0, evaluation=evaluation, lineage=lineage)
        tagged = versions.tag(run / "checkpoints", new)
    print(visible(_sentence(tagged)))
    return _spread(place)


def run_versions(args: Sequence[str]) -> int:
    """`checkpoints versions`."""
    command = read(VersionsCommand, "versions", args, "Lists the versions of a run.", VERSIONS_EXAMPLES)
    from jaxscale.checkpoint import versions

    _, run = _opened(command.run, "versions")
    registry = versions.read(run / "checkpoints")
    if command.json:
        print(json.dumps([dataclasses.asdict(one) for one in registry.versions.values()]))
    elif not registry.versions:
        print(f"{run} has no version yet; jaxscale checkpoints tag {run} STEP NAME makes one")
    else:
        rows = [("name", "step", "state", "eval loss", "tokens", "manifest")]
        for one in registry.versions.values():
            told = one.evaluation
            loss, tokens = (f"{told.loss:.4f}", f"{told.tokens:,.0f}") if told else ("", "")
            rows.append((one.name, str(one.step), one.state, loss, tokens, one.digest))
        print("\n".join(map(visible, table(rows, frozenset({1, 4})))))
    return 0


def run_promote(args: Sequence[str]) -> int:
    """`checkpoints promote`: 0, 2 where the gate is closed."""
    command = read(PromoteCommand, "promote", args, "Moves a version up one stage, through a gate.", PROMOTE_EXAMPLES)
    from jaxscale.checkpoint import versions
    from jaxscale.checkpoint.promotion import find, promoted

    place, run = _opened(command.run, "promote")
    folder = run / "checkpoints"
    registry = versions.read(folder)
    promoted(registry, command.name, command.margin)  # before a checkpoint is read
    _check_same(place, run, find(registry, command.name))
    changed = versions.change(folder, lambda now: promoted(now, command.name, command.margin), margin=command.margin)
    _print_changes(registry, changed)
    return _spread(place)


def run_retire(args: Sequence[str]) -> int:
    """`checkpoints retire`."""
    command = read(RetireCommand, "retire", args, "Takes a version out of the way; its step stays.", RETIRE_EXAMPLES)
    from jaxscale.checkpoint import versions
    from jaxscale.checkpoint.promotion import retired

    place, run = _opened(command.run, "retire")
    registry = versions.read(run / "checkpoints")
    _print_changes(registry, versions.change(run / "checkpoints", lambda now: retired(now, command.name)))
    return _spread(place)


def run_rollback(args: Sequence[str]) -> int:
    """`checkpoints rollback`: 0, 1 where the step to go back to is damaged, 2 where there is none."""
    command = read(RollbackCommand, "rollback", args, "Puts back what was in production before.", ROLLBACK_EXAMPLES)
    from jaxscale.checkpoint import versions
    from jaxscale.checkpoint.promotion import rolled_back

    place, run = _opened(command.run, "rollback")
    registry = versions.read(run / "checkpoints")
    (name,) = [name for name, state in rolled_back(registry) if state == "production"]
    _check_same(place, run, registry.versions[name])
    _print_changes(registry, versions.change(run / "checkpoints", rolled_back, back=True))
    return _spread(place)


def run_card(args: Sequence[str]) -> int:
    """`checkpoints card`."""
    command = read(CardCommand, "card", args, "Prints the model card of a version, in Markdown.", CARD_EXAMPLES)
    from jaxscale.checkpoint import layout, versions
    from jaxscale.checkpoint.card import card
    from jaxscale.checkpoint.promotion import find

    _, run = _opened(command.run, "card")
    registry = versions.read(run / "checkpoints")
    path = layout.step_folder(run / "checkpoints", find(registry, command.name).step)
    manifest, record = layout.read_manifest(path), layout.read_record(path)
    sizes = {name: math.prod(shape) for name, (shape, _) in manifest.arrays.items()}
    print(card(registry, command.name, record.config, sizes), end="")
    return 0


def _opened(run: str, what: str) -> tuple[Place, Path]:
    from jaxscale.checkpoint.place import local, open_place

    place = open_place(run)
    return place, local(place, what)


def _check_whole(place: Place, step: int) -> None:
    """Raises DamagedCheckpoint."""
    from jaxscale.checkpoint.listing import look
    from jaxscale.checkpoint.manifest import DamagedCheckpoint
    from jaxscale.checkpoint.verify import verify_step

    one = look(place.store, step)
    reasons = [one.detail] if one.state != "sealed" else [found.reason for found in verify_step(place.store, step)]
    if reasons:
        raise DamagedCheckpoint(f"step {step} is not whole: {reasons[0]}; see `checkpoints verify`")


def _check_same(place: Place, run: Path, version: Version) -> None:
    """What is to be used is whole, and what was tagged. Raises DamagedCheckpoint, PlaceError."""
    from jaxscale.checkpoint.lineage import digest_of
    from jaxscale.checkpoint.manifest import DamagedCheckpoint

    place.known(version.step)
    _check_whole(place, version.step)
    if digest_of(run, version.step) != version.digest:
        raise DamagedCheckpoint(
            f"step {version.step} was saved anew since it was tagged as {version.name!r}, and is not that version now"
        )


def _evaluation_of(run: Path, step: int) -> Any:
    """As training measured it after that step: in its record, or in the line that was written later."""
    from jaxscale.checkpoint import layout, versions
    from jaxscale.track.jsonl import read_metrics

    record = layout.read_record(layout.step_folder(run / "checkpoints", step))
    found = versions.evaluation_of(record.metrics_line)
    if found is None:
        lines = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] == step]
        found = versions.evaluation_of(lines[0]) if lines and lines[0].get("epoch") == record.epoch else None
    return found


def _sentence(one: Version) -> str:
    told = f"evaluation loss {one.evaluation.loss:.4f}" if one.evaluation else "no evaluation"
    return f"{one.name} is step {one.step} ({one.state}), {told}"


def _print_changes(before: Registry, after: Registry) -> None:
    for name, one in after.versions.items():
        was = before.versions[name].state if name in before.versions else ""
        if one.state != was:
            print(visible(f"{name} (step {one.step}): {was} -> {one.state}"))


def _spread(place: Place) -> int:
    """The journal goes to the further locations too. 0, or 1 where one did not take it."""
    from jaxscale.checkpoint.place import BOUNDS, further
    from jaxscale.checkpoint.versions import VERSIONS
    from jaxscale.storage.addresses import open_store
    from jaxscale.storage.guarded import GuardedStore

    assert place.folder is not None
    code = 0
    for address in further(place):
        try:
            data = (place.folder / VERSIONS).read_bytes()
            GuardedStore(open_store(address), BOUNDS).write(f"checkpoints/{VERSIONS}", data)
        except Exception as error:  # whatever a library makes of an outage
            print(f"warning: done here, and {address} was not told: {error}", file=sys.stderr)
            code = 1
    return code
