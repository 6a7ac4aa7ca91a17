"""The state of a run that starts: weights from the seed, or from another run's checkpoint.

Read next: `worker.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale import tree
from jaxscale.checkpoint.stored_layout import loaded
from jaxscale.config import Config, ConfigError
from jaxscale.optim.build import Optimizer
from jaxscale.task import Task
from jaxscale.train.protocols import Record
from jaxscale.train.state import State, make_init


def initial_state(config: Config, task: Task, optimizer: Optimizer, abstract: State) -> tuple[State, str]:
    """The state before step 0 on the current mesh, and a line that says where its weights come from (or nothing).

    Raises ConfigError for an `init_from` that names no checkpoint or a run with another tokenizer, StateMismatch where
    its weights do not fit and `init_map` does not say what becomes of them.
    """
    if not config.init_from:
        return make_init(config, task, optimizer)(), ""
    from jaxscale.checkpoint.layout import read_record, step_folder
    from jaxscale.checkpoint.renames import Renames
    from jaxscale.checkpoint.restore import restore_renamed

    folder, step = find_checkpoint(config.init_from)
    record = read_record(step_folder(folder, step))
    _check_tokenizer(config, record, folder.parent)
    # The other run's average, where it kept one, is in float32 whatever its weights are.
    wide = jax.tree.map(lambda x: x.update(dtype=jnp.float32), abstract["params"])
    average = bool(record.config["optim"]["ema"])

    fresh: tuple[str, ...] = ()

    def load(stored: Mapping[str, Any]) -> State:
        nonlocal fresh
        wanted = stored["params"]
        found, fresh = restore_renamed(folder, step, wanted, Renames(config.init_map), average=average)
        if fresh:
            seeded = make_init(config, task, optimizer)()["params"]
            if task.stored_layout is not None:
                seeded = jax.jit(task.stored_layout.store)({"params": seeded})["params"]
            types, leaves = tree.flatten(wanted), tree.flatten(seeded)
            filled = {path: leaves[path].astype(types[path].dtype) for path in fresh}
            found = tree.unflatten({**tree.flatten(found), **filled})
        return {"params": found}

    wanted = {"params": wide if average else abstract["params"]}
    params = loaded(task.stored_layout, wanted, load)["params"]
    narrow = jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract["params"])
    state = make_init(config, task, optimizer)(narrow)
    still = f", but {', '.join(fresh)} from the seed" if fresh else ""
    return state, f"weights from step {step} of {folder.parent}{still}; optimizer, schedule and data start afresh"


def _check_tokenizer(config: Config, record: Record, run: Path) -> None:
    """Weights belong to token ids: under another tokenizer each row of the embedding would stand for another piece."""
    from jaxscale.data.tokenizer import load_tokenizer

    before: Mapping[str, str] | None = record.data.get("tokenizer")
    now = load_tokenizer(config.data.tokenizer, config.data.end_of_document)
    if before is not None and before["hash"] != now.hash:
        raise ConfigError(
            f"{run} was trained with tokenizer {before['name']} ({before['hash'][:8]}), this run uses {now.name} "
            f"({now.hash[:8]}), so its weights stand for other tokens; set data.tokenizer to {run / 'tokenizer'} and "
            "leave data.end-of-document empty, or train from the start without --init-from"
        )


def find_checkpoint(text: str) -> tuple[Path, int]:
    """`RUN@STEP`, or `RUN` for its newest -> (checkpoint folder, step). Raises ConfigError, listing what there is."""
    from jaxscale.checkpoint.restore import list_steps

    run, at, wanted = text.rpartition("@") if "@" in text else (text, "", "")
    folder = Path(run) / "checkpoints"
    steps = list_steps(folder) if folder.is_dir() else []
    if not steps:
        raise ConfigError(f"{run} has no checkpoints; give the directory of a run that saved one")
    if not at:
        return folder, steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise ConfigError(f"{run} has no checkpoint of step {wanted!r}; it has {', '.join(map(str, steps))}")
    return folder, int(wanted)
