"""Loading a state onto whatever mesh there is now, from the newest checkpoint that can be trusted.

Before any array is read, the saved tree is compared with the wanted one; a damaged step is reported and the next older
one tried; checkpoints that are there but cannot be read are an error, never a fresh start. Read next: `train/loop.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxscale import config as config_library
from jaxscale import environment as environment_library
from jaxscale import tree
from jaxscale.checkpoint import agree, holds, layout
from jaxscale.checkpoint.by_slice import as_stored
from jaxscale.checkpoint.compare import StateMismatch, describe, differences
from jaxscale.checkpoint.layout import list_steps, newest_step
from jaxscale.checkpoint.load_files import load
from jaxscale.checkpoint.manifest import Arrays, DamagedCheckpoint, Manifest
from jaxscale.checkpoint.patience import STORAGE_SECONDS, UNBROKEN, Patience, may_pass
from jaxscale.checkpoint.renames import Renames, Taken
from jaxscale.config import ConfigError
from jaxscale.retry import Retry
from jaxscale.train.protocols import Record

__all__ = [
    "StateMismatch",
    "list_steps",
    "newest_step",
    "restore",
    "restore_newest",
    "restore_params",
    "resume_report",
]

logger = logging.getLogger(__name__)

Rejected = Callable[[int, str], None]
"""Told of each step that was refused, with the reason."""


def restore(
    folder: Path, step: int, abstract_state: Mapping[str, Any], patience: Patience | None = None
) -> tuple[dict[str, Any], Record]:
    """Loads one step.

    `abstract_state`: nested dict of `jax.ShapeDtypeStruct` with shardings, on any mesh and any number of devices; all
    processes of the world call this. Returns the state as `jax.Array`s of exactly these shapes, dtypes and shardings.
    Raises StateMismatch (lists what differs) and DamagedCheckpoint, on all processes alike; the latter for storage that
    is away only after `patience.STORAGE_SECONDS`, or what is left of the `patience` given.
    """
    path = layout.step_folder(folder.absolute(), step)
    patience = patience or Patience(f"reading {path}")
    with _held(folder, step, "a start"):
        return patience.call(lambda: _restore(path, abstract_state), DamagedCheckpoint)


def _restore(path: Path, abstract_state: Mapping[str, Any]) -> tuple[dict[str, Any], Record]:
    def check() -> Manifest:
        manifest = layout.check_files(path)
        _compare(path, manifest.arrays, describe(as_stored(abstract_state, manifest.arrays)), whole=True)
        return manifest

    manifest = _raise_together(check)
    record = _raise_together(lambda: layout.read_record(path))
    return _load(path, manifest, abstract_state), record


def restore_newest(
    folder: Path,
    abstract_state: Mapping[str, Any],
    rejected: Rejected | None = None,
    repair: Callable[[int], bool] | None = None,
) -> tuple[dict[str, Any], Record] | None:
    """Loads the newest step that can be trusted; None only where no save was ever finished.

    A damaged step is reported (a warning, and `rejected(step, reason)`) and the next older one is tried, unless
    `repair(step)`, called by all processes, says on all of them that the step was replaced. Raises
    DamagedCheckpoint when there are steps and none can be read, StateMismatch when the newest readable one does not
    fit.
    """
    patience = Patience(f"reading {folder}")
    steps = agree.from_first(_listed(folder) if jax.process_index() == 0 else None)
    reasons: list[str] = []
    for step in reversed(steps):
        is_repaired = True
        while is_repaired:
            try:
                return restore(folder, step, abstract_state, patience)
            except DamagedCheckpoint as error:
                logger.warning("CHECKPOINT OF STEP %d IS DAMAGED and will not be used: %s", step, error)
                reasons.append(f"step {step}: {error}")
                if rejected is not None:
                    rejected(step, str(error))
            is_repaired = repair is not None and repair(step)
    if reasons:
        raise DamagedCheckpoint(
            f"{folder} has {len(reasons)} checkpoint(s) and none can be read:\n  " + "\n  ".join(reasons) + "\n"
            "training does not start afresh over them; put the files back, or move the folder away to start from step 0"
        )
    return None


def _listed(folder: Path) -> list[int]:
    """On process 0; the others wait for what it says."""
    list_them = partial(layout.committed, folder)
    return Retry("durable tier", UNBROKEN, transient=may_pass).call(list_them, seconds=STORAGE_SECONDS)


def restore_params(
    folder: Path, step: int, abstract_params: Mapping[str, Any], *, average: bool = False
) -> dict[str, Any]:
    """Loads only the weights of a step, for generation or to start another run from them.

    `abstract_params`: nested dict of `jax.ShapeDtypeStruct` with shardings. `average` takes the exponential moving
    average where the checkpoint has one. Raises StateMismatch and DamagedCheckpoint as `restore` does.
    """
    path = layout.step_folder(folder.absolute(), step)
    read = partial(_restore_params, path, abstract_params, average)
    with _held(folder, step, "whoever loads its weights"):
        return Patience(f"reading {path}").call(read, DamagedCheckpoint)


def _restore_params(path: Path, abstract_params: Mapping[str, Any], average: bool) -> dict[str, Any]:
    manifest = _raise_together(lambda: layout.check_files(path))
    branch = _branch(manifest, average)
    wanted = {branch: abstract_params}
    _raise_together(lambda: _compare(path, manifest.arrays, describe(wanted), whole=False))
    found: dict[str, Any] = _load(path, manifest, wanted)[branch]
    return found


def restore_renamed(
    folder: Path, step: int, abstract_params: Mapping[str, Any], renames: Renames, *, average: bool = False
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """As `restore_params`, where each difference of the two models has to be said.

    Returns the weights, without those that stay as the seed makes them, and the paths of these. The StateMismatch lists
    every difference that `renames` says nothing of.
    """
    path = layout.step_folder(folder.absolute(), step)
    read = partial(_restore_renamed, path, abstract_params, renames, average)
    with _held(folder, step, "whoever loads its weights"):
        return Patience(f"reading {path}").call(read, DamagedCheckpoint)


def _restore_renamed(
    path: Path, abstract_params: Mapping[str, Any], renames: Renames, average: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    manifest = _raise_together(lambda: layout.check_files(path))
    branch = _branch(manifest, average) + "/"
    saved = {name.removeprefix(branch): array for name, array in manifest.arrays.items() if name.startswith(branch)}

    def check() -> Taken:
        taken, lines = renames.taken(describe(abstract_params), saved)
        if lines:
            raise StateMismatch(
                "\n  ".join([f"{path} holds other weights than this run:", *lines])
                + "\nuse the model settings of the run that saved it, or weights that fit (--init-from), or say what "
                "becomes of each with --init-map: NEW=OLD, NEW= (stays as the seed makes it), =OLD (left out)"
            )
        return taken

    taken = _raise_together(check)
    leaves = tree.flatten(abstract_params)
    wanted = tree.unflatten({branch + old: leaves[new] for new, old in taken.sources.items()})
    found = tree.flatten(_load(path, manifest, wanted))
    return tree.unflatten({new: found[branch + old] for new, old in taken.sources.items()}), taken.fresh


def _branch(manifest: Manifest, average: bool) -> str:
    return "ema" if average and any(name.startswith("ema/") for name in manifest.arrays) else "params"


def resume_report(
    record: Record, config: config_library.Config, environment: Mapping[str, Any], identity: Mapping[str, Any]
) -> list[str]:
    """What is not as it was when the checkpoint was written, one line each, for people. Pure.

    Fields that only say where a run goes are left out. Raises ConfigError if the checkpoint is of another recipe; other
    data is refused by the data room, which knows what may change.
    """
    if record.config.get("name") != config.name:
        raise ConfigError(
            f"the checkpoint of step {record.step} is of recipe {record.config.get('name')!r}, "
            f"this run is {config.name!r}; give another --run.dir"
        )
    settings = config_library.diff(dict(record.config), config_library.to_dict(config))
    return [
        *(f"config: {line}" for line in settings if not _is_placement(line)),
        *(f"environment: {line}" for line in environment_library.diff(record.environment, environment)),
        *(f"data: {line}" for line in config_library.diff(dict(record.data), dict(identity))),
    ]


def _is_placement(line: str) -> bool:
    field = line.split(":", 1)[0]
    return any(field == place or field.startswith(place + ".") for place in config_library.PLACEMENT)


def _compare(path: Path, saved: Arrays, wanted: Arrays, *, whole: bool) -> None:
    if not whole:
        saved = {name: array for name, array in saved.items() if name in wanted}
    lines = differences(saved, wanted)
    if lines:
        remedy = "use the model and optimizer settings of the checkpoint, or another --run.dir"
        if not whole:
            remedy = "use the model settings of the run that saved it"
        shown = "\n  ".join(lines[:20]) + (f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise StateMismatch(f"{path} holds other arrays than this run:\n  {shown}\n{remedy}")


def _load(path: Path, manifest: Manifest, abstract: Mapping[str, Any]) -> dict[str, Any]:
    error: DamagedCheckpoint | None = None
    state: dict[str, Any] = {}
    try:
        state = load(path, manifest, abstract)
    except DamagedCheckpoint as caught:
        error = caught
    if not agree.everywhere(error is None):
        raise error or DamagedCheckpoint(f"{path} cannot be read: another process could not read its part; see its log")
    return state


def _held(folder: Path, step: int, who: str) -> contextlib.AbstractContextManager[None]:
    """Nobody deletes the step meanwhile. Process 0 holds it: it is done when all are, as they agree at the end."""
    return holds.reading(folder if jax.process_index() == 0 else None, step, who)


def _raise_together[Value](check: Callable[[], Value]) -> Value:
    """Runs a check on every process; where it fails on one it raises on all, before any waits for another."""
    value: Value
    error: DamagedCheckpoint | StateMismatch | None = None
    try:
        value = check()
    except (DamagedCheckpoint, StateMismatch) as caught:
        error = caught
    if not agree.everywhere(not isinstance(error, DamagedCheckpoint)):
        raise (
            error
            if isinstance(error, DamagedCheckpoint)
            else DamagedCheckpoint("another process cannot read it; see its log")
        )
    if not agree.everywhere(error is None):
        raise error or StateMismatch("another process found other arrays in the checkpoint; see its log")
    return value
