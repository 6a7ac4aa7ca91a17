"""docs/sharding.md shows the table of rules as it is, and types that real code prints."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxscale import axes
from jaxscale.config import Config, MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.recipe import load_recipe
from jaxscale.tree import flatten

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sharding.md").read_text()


def block(marker: str) -> list[str]:
    """Lines after `<!-- marker`, up to the next empty line."""
    after = PAGE.split(f"<!-- {marker}:")[1].split("\n", 1)[1]
    return [line for line in after.split("\n\n")[0].splitlines() if not line.startswith("```")]


def test_rules_are_those_of_the_table():
    shown = {}
    for line in block("rules")[2:]:
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for name, mesh_axes in (cells[0:2], cells[3:5]):
            if name:
                shown[name] = tuple(axis.strip() for axis in mesh_axes.split(",") if axis)
    assert shown == dict(axes.RULES)


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(fsdp=2, tensor=4), MeshConfig(context=2, data=2)])
def test_types_are_those_of_the_model(mesh):
    config: Config = dataclasses.replace(load_recipe(ROOT / "recipes" / "lm_tiny.py").config, mesh=mesh)
    shown = dict(line.split("  ", 1) for line in block("types"))
    with jax.set_mesh(make_mesh(config)):
        task = config.model.task(config)
        types = {path: jax.typeof(x) for path, x in flatten(jax.eval_shape(task.init, jax.random.key(0))).items()}
        up = task.parameters["layers/mlp/up"]
        types["layers/mlp/up, gathered"] = of(up.shape, axes.gathered_spec(up.axes), jnp.float32)
        rows, heads = (8, 256), (4, 64)
        types["tokens"] = of(rows, axes.spec("act_batch", "act_sequence"), jnp.int32)
        residual = axes.spec("act_batch", "act_residual_sequence", "act_embed")
        types["residual stream"] = of((*rows, 256), residual)
        types["inside attention (queries)"] = of(
            (*rows, *heads), axes.spec("act_batch", "act_sequence", "act_heads", None)
        )
        types["inside the MLP"] = of((*rows, 1024), axes.spec("act_batch", "act_sequence", "act_mlp"))
    assert {name: text.strip() for name, text in shown.items()} == {name: str(types[name]) for name in shown}


def of(shape: tuple[int, ...], spec: jax.P, dtype: jnp.dtype = jnp.bfloat16) -> jax.core.ShapedArray:
    return jax.typeof(jax.eval_shape(lambda: jnp.zeros(shape, dtype, out_sharding=spec)))
