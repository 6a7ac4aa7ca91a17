"""Whether all processes of a world were started alike. If not, all of them refuse, before anything is written.

Nothing that comes later would notice: each process computes its part with its own config and data, and the sum of
gradients of two different runs is a number like any other. Read next: `run_directory.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxscale.config import Config, ConfigError, flatten, to_dict
from jaxscale.run_directory import run_path
from jaxscale.train.protocols import World
from jaxscale.world import broadcast_json, gather_text

PER_HOST = frozenset(["data.cache", "run.compilation_cache"])
"""Fields that may differ between hosts: they say where things are kept, not what is computed."""

MOST_FIELDS, MOST_CHARACTERS = 6, 80
"""What an error shows of the differences, and of one value."""


class DifferentStart(ConfigError):
    """The processes of a world were not started alike. Raised on all of them, with the same message."""


def check_alike(world: World, config: Config, data: Mapping[str, Any]) -> None:
    """Compares each process's number of processes, config and data with process 0's. All processes call it.

    data: `Source.identity()`. Raises DifferentStart, on all processes, naming the process, the fields and both values.
    """
    mine = facts(world, config, data)
    problem = difference(broadcast_json(world, mine), mine)
    said = {index: text for index, text in enumerate(gather_text(world, problem)) if text}
    if said:
        what = "; ".join(f"process {index}: {text}" for index, text in said.items())
        raise DifferentStart(
            f"the processes were not started alike ({what}); start every process with the same flags, recipe and data "
            f"(only {' and '.join(sorted(PER_HOST)).replace('_', '-')} may differ)"
        )


def facts(world: World, config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same everywhere, as {name: value}."""
    fields = {name: value for name, value in flatten(to_dict(config)).items() if name not in PER_HOST}
    tokenizer = data.get("tokenizer")
    return {
        "number of processes": world.processes,
        **{name.replace("_", "-"): value for name, value in fields.items()},
        "run.dir": str(run_path(config)),
        **({"tokenizer": f"{tokenizer['name']} ({tokenizer['hash']})"} if tokenizer else {}),
        **{f"content of {address}": content for content, address in data["corpora"].items()},
    }


def difference(first: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The facts of this process that are not those of process 0, in words; empty where there are none."""
    names = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    shown = [f"{name} is {_short(mine, name)}, on process 0 {_short(first, name)}" for name in names[:MOST_FIELDS]]
    more = [f"and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
    return ", ".join([*shown, *more])


def _short(facts: Mapping[str, Any], name: str) -> str:
    text = json.dumps(facts[name]) if name in facts else "not there"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
