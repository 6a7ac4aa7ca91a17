"""Configs come back from their JSON form as they were, and what cannot come back is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxscale.config import ConfigError, PhaseConfig, SourceConfig, to_dict
from jaxscale.config_file import MODELS, config_from_dict
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.py"))
TINY = load_recipe(next(path for path in RECIPES if path.stem == "lm_tiny")).config


def written(config):
    return json.loads(json.dumps(to_dict(config)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_comes_back(path):
    config = load_recipe(path).config
    assert config_from_dict(written(config)) == config


def test_tuples_and_nested_tuples_come_back():
    sources = (SourceConfig("a", 0.25), SourceConfig("b"))
    data = replace(TINY.data, path="", mixture=sources)
    mesh = replace(TINY.mesh, tensor=2)
    config = replace(TINY, data=data, mesh=mesh, phases=(PhaseConfig(5, mixture=sources), PhaseConfig(7, batch=4)))
    config = replace(config, model=replace(TINY.model, window=(8, 0)))
    back = config_from_dict(written(config))
    assert back == config
    assert hash(back) == hash(config)


def test_missing_fields_take_their_defaults():
    saved = written(TINY)
    del saved["optim"]["ema"], saved["model"]["qk_norm"], saved["evaluate"]
    assert config_from_dict(saved) == TINY


def changed(path, value):
    saved = written(TINY)
    *parents, last = path.split(".")
    node = saved
    for parent in parents:
        node = node[parent]
    node[last] = value
    return saved


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("optim.speed", 3, "optim.speed is no field of OptimConfig"),
        ("steps", "many", "steps is 'many'; expected int"),
        ("steps", True, "steps is True; expected int"),
        ("steps", 1.5, "steps is 1.5; expected int"),
        ("data", [], r"data. is \[\]; expected an object"),
        ("model.kind", "Perceptron", "its model is a 'Perceptron', and this version knows TransformerConfig"),
        ("optim.name", "magic", "optim.name is 'magic'"),
        ("model.window", [1, "x"], "model.window is 'x'"),
        ("mesh.tensor", 1.5, "mesh.tensor is 1.5"),
        ("steps", 0, "a run has at least 1 step"),
    ],
)
def test_what_cannot_come_back_is_named(path, value, said):
    with pytest.raises(ConfigError, match=said) as error:
        config_from_dict(changed(path, value), "runs/x/config.json")
    assert str(error.value).startswith("runs/x/config.json cannot be used: ")


def test_a_config_without_a_name_is_refused():
    saved = written(TINY)
    del saved["name"]
    with pytest.raises(ConfigError, match="lacks a field of Config"):
        config_from_dict(saved)


def test_the_registry_finds_every_model():
    assert MODELS[TransformerConfig.__name__] == TransformerConfig.__module__
