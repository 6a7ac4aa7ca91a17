"""`jaxscale launch RECIPE`: a supervised run, on this machine, of as many emulated hosts as one likes.

Starts a coordinator and an agent per host, starts them again when they die, shows what happens, and decides nothing.
Read next: `../supervisor/coordinator.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxscale.commands.parse import UsageError, parse
from jaxscale.config import Config
from jaxscale.recipe import Recipe, load_recipe

EXAMPLES = """\
  4 hosts in 2 slices, 2 emulated devices each; kill any of their processes and watch:
    {prog} --slices 2 --hosts-per-slice 2 --devices-per-host 2
  with a host to spare:
    {prog} --slices 2 --hosts-per-slice 2 --spares 1
  a checkpoint in memory after each step:
    {prog} --slices 2 --memory.every 1
The same command again continues the run."""


@dataclass(frozen=True)
class LaunchCommand:
    """Flags of `launch`: those of the config, and the shape of the cluster."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    slices: int = 1
    """Groups of hosts that fail together; the mesh axis `data` runs across them."""
    hosts_per_slice: int = 2
    """Hosts of a slice; each has one agent and one worker."""
    devices_per_host: int = 1
    """CPU devices that each host emulates."""
    spares: int = 0
    """Hosts that wait to stand in for one that is lost."""
    restart_after: float = 1.0
    """Seconds after which a host whose agent died comes back, with nothing in its memory; negative: never."""


SHAPE = ("--slices", "--hosts-per-slice", "--devices-per-host", "--spares", "--restart-after")
COORDINATOR = ("--listen", "--job", "--invite", "--elected-within", "--tls-key", "--tls-certificate", "--tls-authority")


def read(args: Sequence[str], prog: str | None = None) -> tuple[Recipe, LaunchCommand, list[str]]:
    """Recipe, resolved command, and the overrides of the config alone, as they were given.

    Raises ConfigError on anything that cannot work, and SystemExit(0) after `--help`.
    """
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print("usage: jaxscale launch RECIPE.py [--slices N] [--hosts-per-slice N] [overrides]\n")
            print("`jaxscale launch RECIPE.py --help` shows the flags of a recipe, their defaults and examples.")
            raise SystemExit(0)
        raise UsageError("launch needs a recipe first: jaxscale launch recipes/lm_nano.py --slices 2")
    recipe = load_recipe(args[0])
    prog = prog or f"jaxscale launch {args[0]}"
    command = parse(
        LaunchCommand,
        args[1:],
        prog=prog,
        description=recipe.description,
        examples=EXAMPLES.format(prog=prog),
        default=LaunchCommand(recipe.config),
    )
    for name, least in (("slices", 1), ("hosts_per_slice", 1), ("devices_per_host", 1), ("spares", 0)):
        if getattr(command, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(command, name)}; use {least} or more")
    if command.config.devices:
        raise UsageError("launch emulates --devices-per-host on each host; drop --devices")
    return recipe, command, overrides(args[1:])


def overrides(args: Sequence[str]) -> list[str]:
    """The arguments without those of `launch` and `coordinator` themselves."""
    return without(args, (*SHAPE, *COORDINATOR))


def without(args: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments without these flags, each of which has one value."""
    kept: list[str] = []
    skip = False
    for argument in args:
        if skip:
            skip = False
            continue
        name, equals, _ = argument.partition("=")
        if name.replace("_", "-") in flags:
            skip = not equals
            continue
        kept.append(argument)
    return kept


def check_packages() -> None:
    """Raises ConfigError where the supervisor's packages are not installed."""
    if importlib.util.find_spec("grpc") is None:
        raise UsageError("the supervisor needs the package grpcio; install it with pip install 'jaxscale[supervise]'")


def run_launch(args: Sequence[str], prog: str | None = None) -> int:
    """Runs the cluster to its end and returns the exit code."""
    recipe, command, rest = read(args, prog)
    check_packages()
    recipe.hooks(command.config)
    from jaxscale.supervisor.launch import Cluster, ClusterShape

    shape = ClusterShape(**{f.name: getattr(command, f.name) for f in dataclasses.fields(ClusterShape)})
    return Cluster(recipe, command.config, rest, shape).run()
