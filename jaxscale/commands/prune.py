"""`jaxscale checkpoints prune RUN`: deletes what is not kept. Read next: `../checkpoint/prune.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxscale.commands.checkpoints import read, rules_of
from jaxscale.commands.parse import UsageError
from jaxscale.commands.wording import count, size
from jaxscale.terminal import visible

if TYPE_CHECKING:
    from jaxscale.checkpoint.place import Place
    from jaxscale.checkpoint.prune import Plan

EXAMPLES = """\
  what would go, and why the others stay:
    jaxscale checkpoints prune runs/mine --keep 3 --days 0 --dry-run
  the same, done:
    jaxscale checkpoints prune runs/mine --keep 3 --days 0
A step stays for any one reason: it is among the newest, young, a milestone, the best evaluation, has a version
(`checkpoints tag`), or somebody reads it. The newest step is read and verified before anything goes: what is damaged
takes no whole step's place. What crashed saves left goes too, unless somebody trains there."""


@dataclass(frozen=True)
class PruneCommand:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run directory."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Delete nothing; say what would go."""
    keep: int | None = None
    """Newest steps that stay; none = checkpoint.keep of the run (10 if that is not known)."""
    days: float = 30.0
    """Every step younger than this stays; 0 = none for its age."""
    milestones: int | None = None
    """Multiples of this many steps stay; 0 = none, none = checkpoint.milestones of the run."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """A JSON object in place of text."""


def run_prune(args: Sequence[str]) -> int:
    """`checkpoints prune`: 0, or 1 where something could not be deleted."""
    command = read(PruneCommand, "prune", args, "Deletes the checkpoints of a run that nothing keeps.", EXAMPLES)
    for name, least in (("keep", 1), ("days", 0), ("milestones", 0)):
        given = getattr(command, name)
        if given is not None and not given >= least:
            raise UsageError(f"--{name} is {given}; use {least} or more")
    from jaxscale.checkpoint.place import local, open_place
    from jaxscale.checkpoint.prune import carry_out, plan, sweep_litter

    place = open_place(command.run)
    folder = local(place, "prune") / "checkpoints"
    rules = rules_of(place, keep=command.keep, keep_days=command.days, milestones=command.milestones)
    who = _who_trains(place)
    made = plan(place, folder, rules, is_live=bool(who))
    gone: list[int] = []
    if not command.dry_run:
        gone = carry_out(folder, [one.step for one in made.goes])
        if not _who_trains(place):
            sweep_litter(folder, made.litter)
    if command.json:
        print(json.dumps(_to_json(made, gone)))
    else:
        print("\n".join(map(visible, _lines(made, gone, who, command))))
    return 0 if command.dry_run or len(gone) == len(made.goes) else 1


def _who_trains(place: Place) -> str:
    """Empty where nobody does."""
    from jaxscale.checkpoint.owner import living
    from jaxscale.supervisor.status import lock_of

    assert place.run is not None
    holder, is_held = lock_of(Path(place.run))
    owner = living(place.store)
    return holder if is_held else owner.text() if owner else ""


def _to_json(made: Plan, gone: Sequence[int]) -> dict[str, object]:
    return {
        "would_delete": [{"step": one.step, "state": one.state, "bytes": one.nbytes} for one in made.goes],
        "kept": [{"step": one.step, "state": one.state, "kept_because": list(one.kept_because)} for one in made.stays],
        "litter": list(made.litter),
        "deleted": list(gone),
    }


def _lines(made: Plan, gone: Sequence[int], who: str, command: PruneCommand) -> list[str]:
    lines = [f"step {one.step} stays: {', '.join(one.kept_because)}" for one in made.stays]
    for one in made.goes:
        did = "would go" if command.dry_run else "is gone" if one.step in gone else "STAYS: see the warning"
        what = {"sealed": "", "partial": ", never finished", "damaged": ", damaged"}[one.state]
        lines.append(f"step {one.step} {did} ({size(one.nbytes)}{what})")
    lines += [f"{name} {'would go' if command.dry_run else 'is gone'} (left by a crash)" for name in made.litter]
    if who:
        lines.append(f"somebody trains there ({who}): unfinished saves are left alone")
    if not made.goes and command.days and any(_is_young(one.kept_because) for one in made.stays):
        lines.append(f"some steps stay for their age alone; --days 0 keeps none for that (now {command.days:g})")
    total = sum(one.nbytes for one in made.goes if command.dry_run or one.step in gone)
    verb = "would be deleted" if command.dry_run else "deleted"
    number = len(made.goes) if command.dry_run else len(gone)
    return [*lines, f"{count(number, 'checkpoint')} {verb}, {size(total)}; {len(made.stays)} kept"]


def _is_young(because: Sequence[str]) -> bool:
    return len(because) == 1 and because[0].startswith("of the last")
