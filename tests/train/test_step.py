"""Whole training steps against a plain one: autodiff of the whole batch, then AdamW in NumPy, all in float64.

AdamW's epsilon is of the size of the gradients, so that an update shows a gradient that is off by a factor; some steps
are clipped and some are not. The reference knows no microbatches: their gradients have to add up to the whole batch's.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transformer import float64_gradients

from jaxscale import axes, tree
from jaxscale.config import Config, OptimConfig, PrecisionConfig, RematConfig, TrainConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.optim.build import make_optimizer
from jaxscale.train.state import init_state
from jaxscale.train.step import make_step

STEPS, ROWS, LENGTH, PARTS = 3, 16, 24, 4
CONFIG = Config(
    "step",
    TransformerConfig(vocabulary=48, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, qk_norm=True),
    steps=STEPS,
    optim=OptimConfig(
        learning_rate=0.1, schedule="constant", warmup=1, weight_decay=0.3, epsilon=1e-2, clip=2.0, ema=0.7
    ),
    train=TrainConfig(microbatches=PARTS, z_loss=0.05),
    precision=PrecisionConfig(compute="float32"),
    remat=RematConfig("none"),
)
RATES = (0.05, 0.1, 0.1)
"""Of each step: one step of warmup."""


def draw_batch(step):
    """Row r is in microbatch r mod 4: the first one counts no token at all, the others more and more."""
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, 48, (ROWS, LENGTH + 1)).astype(np.int32)
    tokens[:, ::2] //= 1 + 5 * step  # an easier text has smaller gradients
    place = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    row = np.arange(ROWS, dtype=np.uint32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones_like(place),
        "positions": place,
        "loss_weight": (place < 7 * (row[:, None] % PARTS)).astype(np.float32),
        "row": row,
    }


def put(batch):
    names = ("act_batch", "act_sequence")
    return {name: jax.device_put(v, axes.sharding(names[: v.ndim])) for name, v in batch.items()}


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values()), dtype=int))
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:count])


def host(params):
    return {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}


@pytest.fixture(scope="module", name="trained")
def _trained():
    """(weights, moving average, metrics) after 0, 1, 2 and 3 steps on data 2 x fsdp 2 x tensor 2. Read only."""
    with jax.set_mesh(mesh_of({"data": 2, "fsdp": 2, "tensor": 2})):
        task = CONFIG.model.task(CONFIG)
        optimizer = make_optimizer(CONFIG.optim, task.parameters, STEPS)
        state, step = jax.jit(lambda: init_state(CONFIG, task, optimizer))(), make_step(CONFIG, task, optimizer)
        seen = [(host(state["params"]), host(state["ema"]), {})]
        for number in range(STEPS):
            state, metrics = step(state, put(draw_batch(number)), np.int32(number))
            seen.append((host(state["params"]), host(state["ema"]), jax.tree.map(float, metrics)))
    return seen


def plain_steps(start, config):
    """What `trained` should be, from its weights before the first step."""
    weights = {path: leaf.astype(np.float64) for path, leaf in start.items()}
    average = dict(weights)
    mean, square = (dict.fromkeys(weights, 0.0) for _ in range(2))
    optim = config.optim
    for number in range(STEPS):
        batch = draw_batch(number)
        gradients, sums = float64_gradients(config.model, weights, batch, config.train.z_loss)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = optim.clip / norm if 0 < optim.clip < norm else 1.0
        for path, weight in weights.items():
            g = gradients[path] * scale
            mean[path] = optim.b1 * mean[path] + (1 - optim.b1) * g
            square[path] = optim.b2 * square[path] + (1 - optim.b2) * g**2
            done = number + 1
            root = np.sqrt(square[path] / (1 - optim.b2**done))
            direction = mean[path] / (1 - optim.b1**done) / (root + optim.epsilon)
            if "norm" not in path:
                direction = direction + optim.weight_decay * weight
            weights[path] = weight - RATES[number] * direction
            average[path] = optim.ema * average[path] + (1 - optim.ema) * weights[path]
        metrics = {**sums, "grad_norm": norm, "tokens": batch["loss_weight"].sum(), "learning_rate": RATES[number]}
        yield dict(weights), dict(average), metrics


def differences(trained, config):
    """Where `trained` is not what the plain steps of a config do: names of metrics, `params` and `ema`."""
    start, found = trained[0][0], set()
    for ours, theirs in zip(trained[1:], plain_steps(start, config), strict=True):
        for name, mine, wanted in zip(("params", "ema"), ours, theirs, strict=False):
            for path, leaf in wanted.items():
                if np.linalg.norm(mine[path] - leaf) > 1e-4 * np.linalg.norm(leaf - start[path]):
                    found.add(name)
        found |= {name for name, value in theirs[2].items() if ours[2][name] != pytest.approx(value, rel=1e-5)}
    return found


def test_a_step_is_that_of_a_plain_implementation(trained):
    assert differences(trained, CONFIG) == set()
    norms = [metrics["grad_norm"] for _, _, metrics in trained[1:]]
    assert min(norms) < CONFIG.optim.clip < max(norms), "a step is clipped and another is not"


@pytest.mark.parametrize(
    ("part", "change", "seen"),
    [
        ("optim", {"clip": 0.0}, ("params", "ema")),
        ("optim", {"weight_decay": 0.0}, ("params", "ema")),
        ("optim", {"ema": 0.5}, ("ema",)),
        ("train", {"z_loss": 0.0}, ("params", "ema", "z_loss")),
    ],
    ids=str,
)
def test_a_part_of_the_step_that_is_left_out_would_be_seen(trained, part, change, seen):
    other = replace(CONFIG, **{part: replace(getattr(CONFIG, part), **change)})
    assert set(seen) <= differences(trained, other)


class Cliff:
    """A task whose loss stays as it is but has an infinite slope, in batches that hold a certain row."""

    def __init__(self, task, row):
        self._task, self._row = task, row

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, params, batch, key):
        total, sums = self._task.loss(params, batch, key)
        here = jnp.any(batch["row"] == self._row)
        still = total - jax.lax.stop_gradient(total)
        edge = jnp.sqrt(jnp.where(here, still, 1.0))  # the root of 0 has an infinite slope
        return total + edge - jax.lax.stop_gradient(edge), sums


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing_and_counts():
    """The gradient of one microbatch of the second step is infinite."""
    config = replace(CONFIG, train=TrainConfig(microbatches=2, spike_window=8))
    with jax.set_mesh(mesh_of({})):
        task = Cliff(config.model.task(config), ROWS + 3)
        optimizer = make_optimizer(config.optim, task.parameters, STEPS)
        state, step = jax.jit(lambda: init_state(config, task, optimizer))(), make_step(config, task, optimizer)
        states, lines = [], []
        for number in range(STEPS):
            batch = draw_batch(number)
            state, metrics = step(state, put({**batch, "row": batch["row"] + number * ROWS}), np.int32(number))
            states.append(host(state))
            lines.append({name: float(value) for name, value in metrics.items()})
    assert [np.isfinite(line["loss"]) for line in lines] == [True, True, True]
    assert [np.isfinite(line["grad_norm"]) for line in lines] == [True, False, True]
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    before, after, then = states
    assert {path for path in before if before[path].tobytes() != after[path].tobytes()} == {"skipped"}
    moved = {path.split("/")[0] for path in after if after[path].tobytes() != then[path].tobytes()}
    assert moved == {"params", "opt", "ema", "window"}
