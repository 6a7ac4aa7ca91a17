"""`jaxscale plan RECIPE --on MESH [--compile]`: what a run would need and do on machines that are not here.

Read next: `../plan/compiled.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxscale.commands.parse import UsageError, parse
from jaxscale.config import Config
from jaxscale.recipe import load_recipe

EXAMPLES = """\
  does it fit, and what does each device hold:
    jaxscale plan recipes/lm_8b.py --on v5e-256
  the same from the compiled program, with its collectives (needs the tpu extra, no TPU):
    jaxscale plan recipes/lm_8b.py --on v5e-256 --compile
  four pipeline stages, which schedule:
    jaxscale plan recipes/lm_8b.py --on v5e-256 --mesh.stage 4 --train.microbatches 16
The exit code is 0 where it fits, else 1."""


@dataclass(frozen=True)
class PlanCommand:
    """Flags of `plan`: those of the config, and how much to find out."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the training step for the mesh file's topology: memory with activations, and every collective."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the plan as JSON."""


def run_plan(args: Sequence[str], prog: str | None = None) -> int:
    """Prints the plan and returns 0 where it fits, 1 where it does not. Raises ConfigError for what cannot be."""
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(f"usage: jaxscale plan RECIPE.py --on MESH [--compile] [overrides]\n\nexamples:\n{EXAMPLES}")
            return 0
        raise UsageError("plan needs a recipe first: jaxscale plan recipes/lm_8b.py --on v5e-256")
    recipe = load_recipe(args[0])
    command = parse(
        PlanCommand,
        args[1:],
        prog=prog or f"jaxscale plan {args[0]}",
        description=recipe.description,
        examples=EXAMPLES,
        default=PlanCommand(recipe.config),
    )
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine would be taken, and is not what is asked for
    from jaxscale.plan.make import make_plan
    from jaxscale.plan.report import json_of, text_of

    plan = make_plan(command.config, command.compile)
    print(json.dumps(json_of(plan)) if command.json else text_of(plan))
    return 0 if plan.lacking <= 0 else 1
