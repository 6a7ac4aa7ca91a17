"""`jaxscale checkpoints scrub RUN`: reads all again, slowly, and mends it. Read next: `../checkpoint/scrub.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxscale.commands.checkpoints import read
from jaxscale.commands.parse import UsageError
from jaxscale.commands.wording import count, size
from jaxscale.terminal import visible

if TYPE_CHECKING:
    from jaxscale.checkpoint.place import Place
    from jaxscale.checkpoint.scrub import Scrubbed
    from jaxscale.storage.store import Store

EXAMPLES = """\
  at most 50 MB a second, beside a run that trains:
    jaxscale checkpoints scrub runs/mine --rate 50
  say what is damaged, and mend nothing:
    jaxscale checkpoints scrub runs/mine --dry-run
  load the newest step as a start would:
    jaxscale checkpoints scrub runs/mine --test-load
The run's further locations (checkpoint.locations) are read too. A damaged file is replaced by the same file of another
place. The exit code is 0 where all is whole in the end, else 1."""


@dataclass(frozen=True)
class ScrubCommand:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run directory, or an address with copies of its steps."""
    step: int | None = None
    """Only this step; none = all."""
    rate: float = 100.0
    """Megabytes a second to read at most; 0 = as fast as it goes."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Mend nothing."""
    test_load: tyro.conf.FlagCreatePairsOff[bool] = False
    """Load the newest step (or --step) wholly, as a start would. Needs the memory of its state."""
    devices: int = 0
    """With --test-load: emulate so many CPU devices; 0 = those that there are."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """A JSON object in place of text."""


def run_scrub(args: Sequence[str]) -> int:
    """`checkpoints scrub`: 0 where all is whole in the end, else 1."""
    command = read(ScrubCommand, "scrub", args, "Reads checkpoints again, slowly, and mends what is damaged.", EXAMPLES)
    if not command.rate >= 0 or command.devices < 0:
        raise UsageError("--rate and --devices are 0 or more")
    from jaxscale.checkpoint.place import local, open_place

    place = open_place(command.run)
    if command.test_load:
        local(place, "scrub --test-load")
    wanted = place.known(command.step)
    found, is_whole, whole = [], True, []
    for where, step, result in _scrubbed(place, wanted, command):
        found.append(_to_json(where, step, result))
        is_whole &= not result.left
        if where == place.address and not result.left:
            whole.append(step)
        if not command.json:
            print("\n".join(map(visible, _lines(where, step, result))), flush=True)
    silent = _silent(place)
    for line in silent:
        print(f"warning: {line}", file=sys.stderr)
    trial: dict[str, Any] | None = None
    if command.test_load and whole:
        trial = _trial(place, max(whole), command)
    if command.json:
        print(json.dumps({"scrubbed": found, "test_load": trial}))
    is_loaded = not command.test_load or (trial is not None and not trial["not_finite"])
    return 0 if is_whole and whole and is_loaded and not silent else 1


def _scrubbed(place: Place, steps: Sequence[int], command: ScrubCommand) -> Iterator[tuple[str, int, Scrubbed]]:
    """Each step at each place, the run's own first."""
    from jaxscale.checkpoint.holds import reading
    from jaxscale.checkpoint.listing import look
    from jaxscale.checkpoint.scrub import Pace, Scrubbed, scrub_step

    stores = [place.store, *_others(place)]
    pace = Pace(command.rate * 1e6)
    for step in steps:
        for store in stores:
            others = [other for other in stores if other is not store]
            with reading(place.folder, step, "checkpoints scrub"):
                one = look(store, step)
                if one.state == "partial":  # a save or a copy under way, or not there at all
                    continue
                yield store.address, step, scrub_step(store, step, others, pace, mend=not command.dry_run)
    if not steps:
        yield place.address, 0, Scrubbed(left="nothing is there")


def _others(place: Place) -> list[Store]:
    """The further locations that answer."""
    return [store for store, reason in _asked(place) if not reason]


def _silent(place: Place) -> list[str]:
    return [reason for _, reason in _asked(place) if reason]


def _asked(place: Place) -> list[tuple[Any, str]]:
    """Each further location, and why it cannot be used."""
    from jaxscale.checkpoint.place import BOUNDS, further
    from jaxscale.checkpoint.step_copy import present
    from jaxscale.storage.addresses import open_store
    from jaxscale.storage.guarded import GuardedStore
    from jaxscale.storage.local_store import LocalStore

    found: list[tuple[Any, str]] = []
    for address in further(place):
        try:
            store = open_store(address)
            store = store if isinstance(store, LocalStore) else GuardedStore(store, BOUNDS)
            present(store)
            if store.address != place.address:
                found.append((store, ""))
        except Exception as error:  # whatever a library makes of an outage
            found.append((None, f"{address} cannot be used: {error}"))
    return found


def _trial(place: Place, step: int, command: ScrubCommand) -> dict[str, Any]:
    """Raises what `try_to_load` raises."""
    from jaxscale.train.logs import quiet_terminal

    quiet_terminal()
    from jaxscale.checkpoint.trial import try_to_load  # with JAX

    assert place.run is not None
    done = try_to_load(place.run, step, command.devices)
    if not command.json:
        what = f"{count(done.arrays, 'array')}, {size(done.nbytes)} in {done.seconds:.1f} s"
        bad = f"; NOT FINITE: {', '.join(done.not_finite)}" if done.not_finite else ""
        print(visible(f"step {step} was loaded: {what}{bad}"))
    return {"step": step, "arrays": done.arrays, "bytes": done.nbytes, "not_finite": list(done.not_finite)}


def _to_json(where: str, step: int, result: Scrubbed) -> dict[str, Any]:
    return {
        "location": where,
        "step": step,
        "state": "damaged" if result.left else "sealed",
        "damage": [{"file": one.file, "shard": one.shard, "reason": one.reason} for one in result.damage],
        "mended_from": result.mended_from,
        "reason": result.left,
    }


def _lines(where: str, step: int, result: Scrubbed) -> list[str]:
    if not result.damage and not result.left:
        return [f"step {step} at {where}: whole"]
    lines = [f"  {one.reason}" for one in result.damage]
    if result.left:
        return [f"step {step} at {where}: DAMAGED STILL: {result.left}", *lines]
    return [f"step {step} at {where}: mended from {result.mended_from}", *lines]
