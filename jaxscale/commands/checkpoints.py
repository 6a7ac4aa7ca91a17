"""`jaxscale checkpoints ...`: what a run has saved, whether it is whole, what is kept. Imports no JAX.

Here: which commands there are, `list` and `verify`. Read next: `../checkpoint/listing.py`, `../checkpoint/verify.py`.
"""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxscale.commands.parse import UsageError, parse
from jaxscale.commands.wording import age, count, size, table
from jaxscale.terminal import visible

if TYPE_CHECKING:
    from jaxscale.checkpoint.listing import StepStatus
    from jaxscale.checkpoint.place import Place
    from jaxscale.checkpoint.retention import Rules
    from jaxscale.checkpoint.verify import Damage

USAGE = """\
usage: jaxscale checkpoints COMMAND RUN ...

  list RUN                what there is, its state, why it is kept, and where else
  verify RUN              read everything and compare it with its digests
  scrub RUN --rate MB     verify slowly, and mend what is damaged from a further location
  prune RUN --dry-run     delete what is not kept; with --dry-run, say what that would be
  tag RUN STEP NAME       give a step a name for good: a version, candidate at first
  versions RUN            the versions, their states and evaluations
  promote RUN NAME        candidate -> canary -> production, where its evaluation is good enough
  rollback RUN            put back what was in production before
  retire RUN NAME         take a version out of the way
  card RUN NAME           its model card: evaluation and lineage, in Markdown

RUN is a run directory, or an address that a run copies its steps to (a folder, s3://bucket/prefix).
`jaxscale checkpoints COMMAND --help` explains a command.

examples:
  jaxscale checkpoints list runs/mine
  jaxscale checkpoints verify runs/mine --step 400
  jaxscale checkpoints verify s3://bucket/runs/mine
  jaxscale checkpoints tag runs/mine 400 v1
"""

LIST_EXAMPLES = """\
  jaxscale checkpoints list runs/mine
  jaxscale checkpoints list s3://bucket/runs/mine
  jaxscale checkpoints list runs/mine --json          one JSON array for a program"""

VERIFY_EXAMPLES = """\
  jaxscale checkpoints verify runs/mine               every step
  jaxscale checkpoints verify runs/mine --step 400 --json
The exit code is 0 where all is whole, 1 where something is damaged (files and arrays are named), 2 for a run or step
that is not there. A save that was never finished is no damage, unless --step asks for it."""

TIER = "durable"


@dataclass(frozen=True)
class ListCommand:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run directory, or an address with copies of its steps."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """A JSON array in place of the table; times in seconds since 1970."""


@dataclass(frozen=True)
class VerifyCommand:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run directory, or an address with copies of its steps."""
    step: int | None = None
    """Only this step; none = all."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """A JSON array in place of text."""


def run_checkpoints(args: Sequence[str], _prog: str | None = None) -> int:
    """Runs `jaxscale checkpoints ARGS` and returns the exit code. Raises ConfigError on bad input, OSError."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] not in COMMANDS:
        nearest = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean `jaxscale checkpoints {nearest[0]}`?" if nearest else f"there are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command 'checkpoints {args[0]}'; {hint}")
    return COMMANDS[args[0]](args[1:])


def read[T](kind: type[T], name: str, args: Sequence[str], description: str, examples: str) -> T:
    """The flags of one of the commands. Raises UsageError, and SystemExit(0) after `--help`."""
    prog = f"jaxscale checkpoints {name}"
    if not args:
        raise UsageError(f"checkpoints {name} needs a run: {prog} runs/mine")
    return parse(kind, args, prog=prog, description=description, examples=examples)


def run_list(args: Sequence[str]) -> int:
    """`checkpoints list`: 0, or 1 where a further location does not say what it has."""
    command = read(ListCommand, "list", args, "Lists the checkpoints of a run, and why each is kept.", LIST_EXAMPLES)
    from jaxscale.checkpoint.listing import list_all
    from jaxscale.checkpoint.place import open_place

    place, now = open_place(command.run), time.time()
    copies, silent = _copies(place)
    steps = list_all(place, rules_of(place), now, copies)
    if command.json:
        print(json.dumps([_to_json(one, place, now) for one in steps]))
    else:
        print("\n".join(map(visible, _lines(steps, place, now, bool(copies)))))
    for line in silent:
        print(f"warning: {line}", file=sys.stderr)
    return 1 if silent else 0


def rules_of(place: Place, **given: Any) -> Rules:
    """What the run's settings keep; `given` (without Nones) counts before them."""
    from jaxscale.checkpoint.place import whole
    from jaxscale.checkpoint.retention import Rules

    defaults = Rules()
    said: dict[str, Any] = {
        "keep": max(1, whole(place, "keep", defaults.keep)),
        "milestones": whole(place, "milestones", defaults.milestones),
    }
    return Rules(**said | {name: value for name, value in given.items() if value is not None})


def _copies(place: Place) -> tuple[dict[str, list[int]], list[str]]:
    """What each further location has; and of those that do not say, why."""
    from jaxscale.checkpoint.place import BOUNDS, further
    from jaxscale.checkpoint.step_copy import steps_at
    from jaxscale.storage.addresses import open_store
    from jaxscale.storage.guarded import GuardedStore

    found, silent = {}, []
    for address in further(place):
        try:
            store = open_store(address)
            if store.address != place.address:
                found[address] = steps_at(GuardedStore(store, BOUNDS))
        except Exception as error:  # whatever a library makes of an outage
            silent.append(f"what {address} has is not known: {error}")
    return found, silent


def _to_json(one: StepStatus, place: Place, now: float) -> dict[str, Any]:
    return {
        "step": one.step,
        "tier": TIER,
        "state": one.state,
        "bytes": one.nbytes,
        "time": one.time,
        "kept_because": list(one.kept_because),
        "age_seconds": None if one.time is None else max(0.0, now - one.time),
        "loss": one.loss,
        "detail": one.detail,
        "location": place.address,
        "also_at": list(one.also_at),
    }


def _lines(steps: Sequence[StepStatus], place: Place, now: float, has_copies: bool) -> list[str]:
    from jaxscale.checkpoint.sharing import on_disk

    if not steps:
        return [f"{place.address} has no checkpoint yet"]
    columns: dict[str, list[str]] = {
        "step": [str(one.step) for one in steps],
        "state": [one.state for one in steps],
        "size": [size(one.nbytes) for one in steps],
        "age": ["" if one.time is None else age(max(0.0, now - one.time)) for one in steps],
        "eval loss": ["" if one.loss is None else f"{one.loss:.4f}" for one in steps],
        "copies": [str(len(one.also_at)) if has_copies else "" for one in steps],
        "kept because": [", ".join(one.kept_because) or "nothing: prune deletes it" for one in steps],
    }
    rows = zip(*([name, *cells] for name, cells in columns.items() if any(cells)), strict=True)
    shown = table(list(rows), frozenset({0, 2}))
    shown += [f"step {one.step} is damaged: {one.detail}" for one in steps if one.state == "damaged"]
    total, shared = sum(one.nbytes for one in steps), ""
    if place.folder is not None and (stored := on_disk(place.folder, [one.step for one in steps])) < total:
        shared = f" ({size(stored)} on the disk: what did not change is shared)"
    return [*shown, f"{count(len(steps), 'checkpoint')}, {size(total)}{shared} at {place.address}"]


def run_verify(args: Sequence[str]) -> int:
    """`checkpoints verify`: 0 where all is whole, else 1."""
    command = read(
        VerifyCommand, "verify", args, "Reads checkpoints and compares them with their digests.", VERIFY_EXAMPLES
    )
    from jaxscale.checkpoint.place import open_place

    place = open_place(command.run)
    shown, states = [], []
    for one, damage, read_bytes in _verified(place, place.known(command.step)):
        states.append("damaged" if damage else one.state)
        shown.append(
            {
                "step": one.step,
                "tier": TIER,
                "state": states[-1],
                "bytes": read_bytes,
                "damage": [{"file": d.file, "shard": d.shard, "reason": d.reason} for d in damage],
            }
        )
        if not command.json:
            print("\n".join(map(visible, _verdict(one, damage, read_bytes))), flush=True)
    if command.json:
        print(json.dumps(shown))
    is_wanted = states == ["sealed"] if command.step is not None else "sealed" in states and "damaged" not in states
    return 0 if is_wanted else 1


def _verified(place: Place, steps: Sequence[int]) -> Iterator[tuple[StepStatus, list[Damage], int]]:
    """Each step, what is wrong with it, and how many bytes were read. A step that is deleted meanwhile is left out."""
    from jaxscale.checkpoint.holds import reading
    from jaxscale.checkpoint.listing import look
    from jaxscale.checkpoint.verify import Damage, verify_step

    for step in steps:
        done: list[int] = []
        with reading(place.folder, step, "checkpoints verify"):
            one = look(place.store, step)
            damage = []
            if one.state != "partial":
                damage = verify_step(place.store, step, done.append)
                if one.state == "damaged" and not damage:
                    damage = [Damage(one.detail)]
            if one.state != "sealed" and len(steps) > 1 and step not in place.steps():
                continue
        yield one, damage, sum(done)


def _verdict(one: StepStatus, damage: Sequence[Damage], nbytes: int) -> list[str]:
    if damage:
        lost = [f"  {found.reason}" + (f"; lost: {found.shard}" if found.shard else "") for found in damage]
        return [f"step {one.step}: DAMAGED, {count(len(damage), 'thing')} wrong", *lost]
    if one.state == "partial":
        return [f"step {one.step}: {one.detail}; nothing to verify"]
    return [f"step {one.step}: whole, {size(nbytes)} read"]


def _prune(args: Sequence[str]) -> int:
    from jaxscale.commands.prune import run_prune

    return run_prune(args)


def _scrub(args: Sequence[str]) -> int:
    from jaxscale.commands.scrub import run_scrub

    return run_scrub(args)


def _of_versions(name: str) -> Callable[[Sequence[str]], int]:
    def run(args: Sequence[str]) -> int:
        from jaxscale.commands import versions

        command: Callable[[Sequence[str]], int] = getattr(versions, f"run_{name}")
        return command(args)

    return run


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": run_list,
    "verify": run_verify,
    "scrub": _scrub,
    "prune": _prune,
    **{name: _of_versions(name) for name in ("tag", "versions", "promote", "retire", "rollback", "card")},
}
