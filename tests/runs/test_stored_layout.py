"""A run that keeps its layers in an order and a number of its own writes checkpoints that any other run reads."""

from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import config_of, losses

from jaxscale import trainer, tree
from jaxscale.checkpoint.layout import check_files, step_folder
from jaxscale.checkpoint.stored_layout import StoredLayout
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.train.protocols import World

PADDING = 2
"""Layers of zeros behind the real ones."""


def of_layers(change):
    """The same change to every stack of layers of a state: of weights, their average and the optimizer's slots."""

    def changed(state):
        return tree.map_paths(lambda path, x: change(x) if "layers/" in f"{path}/" else x, dict(state))

    return changed


def pad(stack):
    """Reversed, as a program may want them, and behind them layers of zeros."""
    return jnp.concatenate([stack[::-1], 0 * stack[:PADDING]])


def cut(stack):
    return stack[:-PADDING][::-1]


class PaddedTask:
    """The model of the task inside it, bit for bit, with weights that lie otherwise."""

    stored_layout = StoredLayout(store=of_layers(cut), restore=of_layers(pad))

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    @property
    def parameters(self):
        return {
            path: replace(p, shape=(p.shape[0] + PADDING, *p.shape[1:])) if path.startswith("layers/") else p
            for path, p in self._task.parameters.items()
        }

    def init(self, key):
        return of_layers(pad)(self._task.init(key))

    def loss(self, params, batch, key):
        return self._task.loss(of_layers(cut)(params), batch, key)


@dataclass(frozen=True)
class PaddedConfig(TransformerConfig):
    def task(self, config):
        return PaddedTask(super().task(config))


def train(folder, steps, *flags, padded):
    config = config_of(
        "--run.dir", folder, "--devices", 2, "--model.layers", 3, "--steps", steps, "--optim.ema", 0.9, *flags
    )
    if padded:
        values = {field.name: getattr(config.model, field.name) for field in fields(config.model)}
        config = replace(config, model=PaddedConfig(**values))
    trainer.train(config, World())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of the model as it is."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(folder, 4, padded=False)
    return folder


def arrays(folder, step):
    return check_files(step_folder(folder / "checkpoints", step)).arrays


@pytest.mark.parametrize("padded_first", [True, False])
def test_a_checkpoint_moves_between_layouts(tmp_path, plain, padded_first):
    run = tmp_path / "run"
    train(run, 2, padded=padded_first)
    assert arrays(run, 2) == arrays(plain, 4), "checkpoints have the shapes of the model, whoever wrote them"
    train(run, 4, padded=not padded_first)
    np.testing.assert_allclose(losses(run), losses(plain), rtol=1e-6)
    assert arrays(run, 4) == arrays(plain, 4)


def test_a_run_goes_on_in_its_own_layout(tmp_path, plain):
    run = tmp_path / "run"
    train(run, 2, padded=True)
    train(run, 4, padded=True)
    np.testing.assert_allclose(losses(run), losses(plain), rtol=1e-6)


def test_weights_to_start_from_have_the_stored_layout(tmp_path, plain):
    for name, padded in (("plain", False), ("padded", True)):
        train(tmp_path / name, 1, "--init-from", f"{plain}@4", padded=padded)
    np.testing.assert_allclose(losses(tmp_path / "padded"), losses(tmp_path / "plain"), rtol=1e-6)


def test_both_functions_undo_each_other_bit_for_bit():
    layout, key = PaddedTask.stored_layout, jax.random.key(3)
    stored = {"params": {"layers": {"a": jax.random.normal(key, (3, 4))}, "norm": jnp.ones(4)}}
    back = layout.store(layout.restore(stored))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), stored, back))
    assert layout.restore(stored)["params"]["layers"]["a"].shape == (5, 4)
