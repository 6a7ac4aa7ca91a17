"""`jaxscale train RECIPE [overrides]`: recipe + overrides -> Config -> `trainer.train`.

The command line is read before jax is imported, so that a typing mistake costs no waiting. Read next: `trainer.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxscale.commands.parse import UsageError, parse
from jaxscale.config import EARLY, Config, to_text
from jaxscale.recipe import Recipe, load_recipe
from jaxscale.train.logs import quiet_terminal
from jaxscale.train.protocols import ExitReason

EXAMPLES = """\
  8 emulated devices, weights over 4, tensor-parallel over 2:
    {prog} --devices 8 --mesh.tensor 2
  the mesh file of a slice:
    {prog} --on v5e-256
  longer, faster, elsewhere:
    {prog} --steps 2000 --optim.learning-rate 1e-3 --run.dir runs/mine
  two corpora by weight (PATH[:WEIGHT]):
    {prog} --data.mixture a.jsonl:0.7 b.jsonl:0.3
  from step 1000 on longer rows, from 1500 on another mixture (START:KEY=VALUE,...):
    {prog} --phases 1000:sequence=512,batch=4 1500:mixture=a.jsonl:0.2+b.jsonl:0.8
  one of several processes (TPU pod, Slurm):
    {prog} --distributed auto
  what all this adds up to:
    {prog} --print-config
The same command again continues the run."""


@dataclass(frozen=True)
class TrainCommand:
    """Flags of `train`: those of the config, and how this process takes part."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    distributed: str = ""
    """`auto` (TPU pods and Slurm tell) or ADDRESS,N,I: this is process I of N, and process 0 listens on ADDRESS
    (host:port). Empty: a single process."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Trace a few steps soon after this start into the run directory, for xprof. --run.profile FIRST:LAST chooses."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resolved config, one field a line, and stop."""


def read(args: Sequence[str], prog: str | None = None) -> tuple[Recipe, TrainCommand]:
    """Recipe and resolved command of `train`'s arguments. `prog`: how the user called it, without the arguments.

    Raises ConfigError on anything that cannot work, and SystemExit(0) after `--help`.
    """
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print("usage: jaxscale train RECIPE.py [overrides]\n")
            print("`jaxscale train RECIPE.py --help` shows the flags of a recipe, their defaults and examples.")
            raise SystemExit(0)
        raise UsageError("train needs a recipe first: jaxscale train recipes/lm_tiny.py [overrides]")
    recipe = load_recipe(args[0])
    prog = prog or f"jaxscale train {args[0]}"
    default = TrainCommand(_make_room(recipe.config, args[1:]))
    command = parse(
        TrainCommand,
        args[1:],
        prog=prog,
        description=recipe.description,
        examples=EXAMPLES.format(prog=prog),
        default=default,
    )
    config = command.config
    if command.profile and not config.run.profile:
        run = dataclasses.replace(config.run, profile=EARLY)
        command = dataclasses.replace(command, config=dataclasses.replace(config, run=run))
    return recipe, command


def run_train(args: Sequence[str], prog: str | None = None) -> ExitReason:
    """Trains. Raises ConfigError and its like on bad input, before anything is written."""
    recipe, command = read(args, prog)
    if command.print_config:
        print(to_text(command.config), end="")
        return ExitReason.COMPLETED
    hooks = recipe.hooks(command.config)
    quiet_terminal()
    from jaxscale.trainer import train  # heavy: jax; only now that the command line is known to be right
    from jaxscale.world import parse_distributed

    return train(command.config, parse_distributed(command.distributed), hooks)


def _make_room(config: Config, args: Sequence[str]) -> Config:
    """A config has one corpus or a mixture; naming one on the command line takes the place of the recipe's other."""
    named = {arg.partition("=")[0] for arg in args}
    if "--data.mixture" in named and "--data.path" not in named:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, path=""))
    if "--data.path" in named and "--data.mixture" not in named:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=()))
    return config
