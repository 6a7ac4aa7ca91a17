"""Which meshes a model can be laid out on, asked of the audit in a process of its own."""

import dataclasses
import time
from pathlib import Path

import jax
import pytest

from jaxscale.axes import AXES
from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.optim.build import make_optimizer
from jaxscale.recipe import load_recipe
from jaxscale.supervisor.legal import LegalMeshes
from jaxscale.supervisor.worlds import Request, layouts
from jaxscale.train import state

NANO = Path(__file__).parents[2] / "recipes" / "lm_nano.py"


def sizes(**given):
    return {axis: given.get(axis, 1) for axis in AXES}


def answered(legal, mesh):
    """Waits for the answer, which comes in a thread."""
    deadline = time.monotonic() + 60
    while not legal.is_answered and time.monotonic() < deadline:
        time.sleep(0.05)
    return legal(mesh)


def test_the_audit_says_which_smaller_meshes_fit():
    legal = LegalMeshes()
    assert legal(sizes(fsdp=3))  # nobody knows yet
    legal.ask(str(NANO), ["--steps", "10"], [sizes(fsdp=3), sizes(fsdp=2), sizes(data=3)])
    assert not answered(legal, sizes(fsdp=3))
    assert "mesh axis 'fsdp' (3) does not divide embed (128)" in legal.why(sizes(fsdp=3))
    assert legal.why(sizes(fsdp=2)) == ""
    assert legal(sizes(fsdp=2))
    assert legal(sizes(data=3))


def test_a_recipe_that_cannot_be_read_leaves_everything_legal(caplog):
    legal = LegalMeshes()
    told = []
    legal._ask("nowhere.py", [], [sizes(fsdp=3)], told.append)
    assert legal.is_answered  # nobody is to wait for it any more
    assert legal(sizes(fsdp=3))
    assert len(told) == 1
    assert "nobody knows on which meshes this model fits" in caplog.text


def test_all_worlds_that_could_be_formed():
    request = Request(2, 2, 1, sizes(data=2, fsdp=2))
    assert layouts(request) == [sizes(), sizes(fsdp=2), sizes(data=2), sizes(data=2, fsdp=2)]


def test_what_a_zygote_remembers_of_a_state_is_what_a_worker_would_trace(monkeypatch):
    monkeypatch.setattr(state, "_known", {})
    config = load_recipe(NANO).config
    config = dataclasses.replace(config, devices=4, mesh=MeshConfig(**sizes(data=2, fsdp=2)))
    task = config.model.task(config)
    optimizer = make_optimizer(config.optim, task.parameters, config.steps)
    with jax.set_mesh(make_mesh(config)):
        traced = state.abstract_state(config, task, optimizer)
        state.remember_state(config)
        remembered = state.abstract_state(config, task, optimizer)
    assert remembered is state._known[config]
    assert jax.tree.structure(remembered) == jax.tree.structure(traced)
    for a, b in zip(jax.tree.leaves(remembered), jax.tree.leaves(traced), strict=True):
        assert (a.shape, a.dtype, a.sharding.spec) == (b.shape, b.dtype, b.sharding.spec)


@pytest.mark.parametrize("mesh", [sizes(fsdp=2)])
def test_the_answer_is_found_whatever_the_order_of_the_axes(mesh):
    legal = LegalMeshes()
    legal._wrong = {tuple(sorted(mesh.items())): "it does not fit"}
    assert not legal(dict(reversed(mesh.items())))
