"""Every recipe's training step, the full-size ones too, lowers on an abstract mesh: no devices, no arrays."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from programs import trace_step

from jaxscale.audit import audit
from jaxscale.mesh import abstract_mesh_for, mesh_sizes
from jaxscale.mesh_file import load_chip, load_mesh_file
from jaxscale.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parent.parent.parent / "recipes").glob("*.py"))
OTHER_MESHES = [("lm_8b", "v6e-256"), ("lm_8b", "v5e-256")]
"""Beside the one that a recipe names itself. None with GPUs: JAX lowers cuDNN's attention only where they are."""
FULL_SIZE = {"lm_8b": (256, 8.0e9), "lm_70b": (256, 70.5e9), "lm_128k": (256, 8.0e9), "dlrm_criteo": (16, 26.1e9)}


@pytest.mark.parametrize(
    ("name", "on"), [*((path.stem, "") for path in RECIPES), *OTHER_MESHES], ids=lambda name: name or "its own"
)
def test_recipes_lower(name, on):
    config = load_recipe(next(path for path in RECIPES if path.stem == name)).config
    config = replace(config, on=on or config.on)
    mesh = abstract_mesh_for(config)
    platform = load_chip(load_mesh_file(config.on).chip).platform if config.on else "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        audit(config.model.task(config).parameters, mesh_sizes(mesh), config)
        lowered = trace_step(config, mesh).lower(lowering_platforms=(platform,)).as_text()
    assert "func.func public @main" in lowered
    # The fast kernel of the platform is in the program, not the fallback.
    assert ("tpu_custom_call" in lowered) == (platform == "tpu" and config.model.unit == "tokens")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_recipes_are_full_size(name):
    path = next(path for path in RECIPES if path.stem == name)
    config = load_recipe(path).config
    devices, parameters = FULL_SIZE[name]
    sizes = mesh_sizes(abstract_mesh_for(config))
    report = audit(config.model.task(config).parameters, sizes, config)
    assert abs(report.parameters / parameters - 1) < 0.01
    count = 1
    for size in sizes.values():
        count *= size
    assert count == devices
