"""A recipe: a Python file with `config() -> Config` and, if it wants, `hooks(config) -> Hooks`.

Loading one makes no backend, no thread and no array, so that a process can import it first and fork later. A recipe
ends with `if __name__ == "__main__": run(__file__)`, which does what `jaxscale train FILE` does.
Read next: `commands/train.py`.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from jaxscale.config import Config, ConfigError

if TYPE_CHECKING:
    import jax

    from jaxscale.task import Batch, Params, Task


@dataclass(frozen=True)
class EvaluationContext:
    """What a user's evaluation may look at. Called on every process of the world, inside `jax.set_mesh`."""

    step: int
    """Optimizer steps done."""
    params: Params
    """Nested dict of sharded parameters (the moving average where the run keeps one). Read only."""
    task: Task
    config: Config
    batches: Callable[[], Iterable[Batch]]
    """Batches of the held-out documents, from the start at each call; empty where none are held out."""


@dataclass(frozen=True)
class Hooks:
    """A user's own metrics and evaluations; the numbers go to metrics.jsonl beside the built-in ones."""

    step_metrics: Callable[[Params, Batch], Mapping[str, jax.Array]] | None = None
    """Traced inside the step on each microbatch, before the update. Returns float32 scalars that are *sums weighted by
    `loss_weight`*; the step divides them by the global weight, like the loss."""
    evaluations: Mapping[str, Callable[[EvaluationContext], Mapping[str, float]]] = field(default_factory=dict)
    """Run at each evaluation; a result `x` of the evaluation `name` is written as `name/x`."""


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe file."""

    path: Path
    description: str
    config: Config
    make_hooks: Callable[[Config], Hooks]

    def hooks(self, config: Config) -> Hooks:
        """The recipe's hooks for the config as overridden. Raises ConfigError where they are of another type."""
        hooks = self.make_hooks(config)
        if not isinstance(hooks, Hooks):
            raise ConfigError(
                f"hooks(config) of {self.path} returned {type(hooks).__name__}; return a jaxscale.recipe.Hooks"
            )
        return hooks


def load_recipe(path: str | Path) -> Recipe:
    """Imports a recipe file and calls its `config()`. Raises ConfigError when it is not a recipe."""
    file = _find(Path(path))
    module = _import(file)
    if not callable(getattr(module, "config", None)):
        raise ConfigError(f"{file} is not a recipe: it has no function config(); define `def config() -> Config:`")
    config = module.config()
    if not isinstance(config, Config):
        raise ConfigError(f"config() of {file} returned {type(config).__name__}; return a jaxscale.config.Config")
    return Recipe(file, (module.__doc__ or "").strip(), config, getattr(module, "hooks", lambda _: Hooks()))


def run(path: str) -> NoReturn:
    """The last line of every recipe: trains it with the flags on the command line and ends the process."""
    from jaxscale.cli import (
        main,
    )  # The command line is needed only by a recipe that is run, not by one that is imported.

    sys.exit(main(["train", path, *sys.argv[1:]], prog=f"python {sys.argv[0]}"))


def _find(path: Path) -> Path:
    if path.is_file():
        return path.resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"recipe {str(path)!r} is no plain file; give a Python file with a config() in it")
    near = path if path.is_dir() else path.parent
    recipes = sorted(file.name for file in near.glob("*.py")) if near.is_dir() else []
    nearest = difflib.get_close_matches(path.name, recipes, n=1)
    hint = f"did you mean {near / nearest[0]}?" if nearest else f"{near} has {', '.join(recipes) or 'no recipes'}"
    raise ConfigError(f"there is no recipe file {str(path)!r}; {hint}")


def _import(file: Path) -> ModuleType:
    name = f"jaxscale_recipe_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file; a recipe's name ends in .py")
    # A script finds its neighbours through sys.path; a recipe may import a neighbour however it is started.
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the recipe look their module up here
    spec.loader.exec_module(module)
    return module
