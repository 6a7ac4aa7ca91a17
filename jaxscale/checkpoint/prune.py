"""Deletes what retention does not keep: commit file first, so that a kill in between leaves nothing that looks whole.

`expire` is what training does after each save, `plan` and `carry_out` what a person does. Whatever is held or was
tagged in the meantime is looked for again, under the folder's lock, just before each step goes. Read next:
`layout.delete_step`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from jaxscale.checkpoint import holds, layout, listing, versions
from jaxscale.checkpoint.listing import StepStatus
from jaxscale.checkpoint.place import Place
from jaxscale.checkpoint.retention import Rules, Step, decide, squeezed
from jaxscale.checkpoint.verify import verify_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What would be done."""

    goes: tuple[StepStatus, ...]
    stays: tuple[StepStatus, ...]
    litter: tuple[str, ...] = ()
    """Other names that only a kill can have left: marks of saves, fetches cut short."""

    @property
    def nbytes(self) -> int:
        """Bytes that get free."""
        return sum(one.nbytes for one in self.goes)


def expire(folder: Path, rules: Rules, newest: int, refused: Collection[int] = ()) -> list[int]:
    """After a save: deletes what is not kept any more, and returns it. Reads only small files. Raises OSError.

    `newest`: the step just sealed; `refused`: those that restore could not read. Where the disk is short of room for
    another save fewer steps are kept (`retention.squeezed`).
    """
    known = []
    for step in layout.numbered(folder):
        path = layout.step_folder(folder, step)
        known.append(Step(step, layout.is_sealed(path), loss=_loss(path)))
    good = [one.step for one in known if one.is_sealed and one.step not in refused and one.step <= newest]
    sizes = (_size(layout.step_folder(folder, step)) for step in reversed(good))
    free = shutil.disk_usage(folder).free
    keep = rules.keep
    if good and free < 2 * _size(layout.step_folder(folder, good[-1])):
        keep = squeezed(rules.keep, list(sizes), free)
    if keep < min(rules.keep, len(good)):
        text = "the disk of %s has %.1f GB left: of checkpoints the newest %d are kept, not %d"
        logger.warning(text, folder, free / 1e9, keep, rules.keep)
    facts = listing.facts(folder, time.time(), refused=refused)
    decisions = decide(known, replace(rules, keep=keep), facts, newest)
    return carry_out(folder, [step for step, because in decisions.items() if not because])


def plan(place: Place, folder: Path, rules: Rules, *, is_live: bool) -> Plan:
    """What `carry_out` would delete. Reads the newest step wholly, and older ones until one is whole. Raises OSError.

    `is_live`: somebody trains there; what is unfinished is left alone then, it may be a save under way.
    """
    found = [listing.look(place.store, step) for step in layout.numbered(folder)]
    found = _with_one_whole(place, folder, found)
    facts = listing.facts(folder, time.time())
    decisions = decide([one.known() for one in found], rules, facts)
    goes, stays = [], []
    for one in found:
        because = decisions[one.step]
        if one.state == "partial":
            is_wanted = one.step in facts.holds or one.step in facts.versions
            because = because if is_wanted else ("it may be a save under way",) if is_live else ()
        if because:
            stays.append(replace(one, kept_because=because))
        else:
            goes.append(one)
    return Plan(tuple(goes), tuple(stays), () if is_live else tuple(layout.litter(folder)))


def _with_one_whole(place: Place, folder: Path, found: list[StepStatus]) -> list[StepStatus]:
    """The same, but what looks whole and is not: the newest step that counts is verified. All are kept otherwise."""
    looked = {one.step: one for one in found}
    for one in reversed(found):
        if one.state == "sealed":
            with holds.holding(folder, one.step, "checkpoints prune"):
                damage = verify_step(place.store, one.step)
            if not damage:
                break
            looked[one.step] = replace(one, state="damaged", detail=damage[0].reason)
    return list(looked.values())


def carry_out(folder: Path, goes: Iterable[int], told: Callable[[int], None] | None = None) -> list[int]:
    """Deletes these steps, but for those that are held or tagged by now. Returns what is gone.

    `told` hears of each before it goes. A step that cannot be deleted is a warning, and the others go.
    """
    gone = []
    holds.sweep(folder, time.time())
    for step in goes:
        path = layout.step_folder(folder, step)
        try:
            with holds.locked(folder):
                if step in holds.held(folder, time.time()) or step in versions.read(folder).by_step():
                    logger.info("step %d stays: it is read or was tagged just now", step)
                    continue
                if told is not None:
                    told(step)
                layout.uncommit(path)
            layout.delete_step(path)
        except OSError as error:
            logger.warning("step %d could not be deleted from %s: %s", step, folder, error)
            continue
        if path.exists():
            logger.warning("step %d is no checkpoint any more, and %s could not be deleted wholly", step, path)
        gone.append(step)
    return gone


def sweep_litter(folder: Path, litter: Iterable[str]) -> None:
    """Deletes what `Plan.litter` names. Raises OSError."""
    for name in litter:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _loss(path: Path) -> float | None:
    try:
        return listing.loss_in((path / layout.RECORD[0]).read_bytes())
    except OSError:
        return None


def _size(path: Path) -> int:
    total = 0
    for where, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total
