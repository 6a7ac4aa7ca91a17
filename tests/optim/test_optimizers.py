"""Optimizers against optax's, on one device and sharded, and the form of their state."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale import axes, tree
from jaxscale.config import OptimConfig
from jaxscale.optim import groups
from jaxscale.optim.build import apply_updates, make_optimizer
from jaxscale.optim.clip import clip_by_global_norm, norm_of, sum_of_squares
from jaxscale.optim.schedules import make_schedule
from jaxscale.task import Parameter

LAYERS = 3
TABLE = {
    "embed": Parameter((16, 8), ("vocab", "embed")),
    "layers/attention/q": Parameter((LAYERS, 8, 4, 6), ("layers", "embed", "heads", "head_dim"), matrix_dims=(1, 2)),
    "layers/attention/o": Parameter((LAYERS, 4, 6, 8), ("layers", "heads", "head_dim", "embed"), matrix_dims=(2, 1)),
    "layers/attention/bias": Parameter((LAYERS, 4, 6), ("layers", "heads", "head_dim"), init="zeros"),
    "layers/norm": Parameter((LAYERS, 8), ("layers", "norm"), init="ones"),
    "final_norm": Parameter((8,), ("norm",), init="ones"),
}
MESHES = {
    "one": (1, 1, 1, 1, 1, 1),
    "fsdp8": (1, 1, 8, 1, 1, 1),
    "data2-fsdp2-tensor2": (1, 2, 2, 1, 1, 2),
    "tensor4": (1, 1, 1, 1, 1, 4),
}
NAMES = ("adamw", "muon", "adafactor", "sgd")
STEPS = 5


def draw(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        {path: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32) for path, p in TABLE.items()}
    )


def config(name: str, **changes) -> OptimConfig:
    settings = {"name": name, "learning_rate": 1e-2, "adam_learning_rate": 3e-3, "warmup": 2, "clip": 1.0}
    return OptimConfig(**(settings | changes))


def run(optim: OptimConfig, params: dict, gradients: list[dict]) -> tuple[dict, dict]:
    optimizer = make_optimizer(optim, TABLE, STEPS)

    @jax.jit
    def step(params, state, grads, i):
        grads = clip_by_global_norm(grads, norm_of(sum_of_squares(grads)), optim.clip)
        updates, state = optimizer.update(grads, state, params, i)
        return apply_updates(params, updates), state

    state = optimizer.init(params)
    for i, grads in enumerate(gradients):
        params, state = step(params, state, grads, jnp.int32(i))
    return params, state


@functools.cache
def one_device(optim: OptimConfig) -> tuple[dict, dict]:
    """The run that every mesh is compared with, done once."""
    return run(optim, draw(0, 0.1), some_gradients())


def some_gradients() -> list[dict]:
    return [draw(i + 1, 0.03 if i % 2 else 3.0) for i in range(STEPS)]


def run_optax(transform: optax.GradientTransformation, params: dict, gradients: list[dict]) -> dict:
    state = transform.init(params)
    for grads in gradients:
        updates, state = jax.jit(transform.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def reference(optim: OptimConfig) -> optax.GradientTransformation:
    share = make_schedule(optim, STEPS)
    mask = tree.unflatten({path: path in ("embed", "layers/attention/q", "layers/attention/o") for path in TABLE})
    inner = {
        "adamw": lambda: optax.scale_by_adam(optim.b1, optim.b2, optim.epsilon),
        "sgd": lambda: optax.trace(optim.momentum),
    }[optim.name]()
    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        inner,
        optax.add_decayed_weights(optim.weight_decay, mask),
        optax.scale_by_learning_rate(lambda i: optim.learning_rate * share(i)),
    )


def assert_trees_close(actual: dict, expected: dict, tolerance: float) -> None:
    actual, expected = tree.flatten(actual), tree.flatten(expected)
    assert actual.keys() == expected.keys()
    for path in expected:
        a, b = np.asarray(actual[path], np.float64), np.asarray(expected[path], np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), path


@pytest.fixture
def params():
    return draw(0, 0.1)


@pytest.fixture
def gradients():
    return some_gradients()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_equals_optax(name, params, gradients):
    optim = config(name)
    got, _ = run(optim, params, gradients)
    expected = run_optax(reference(optim), params, gradients)
    moved = jax.tree.map(lambda a, b: a - b, expected, params)
    assert_trees_close(jax.tree.map(lambda a, b: a - b, got, params), moved, 1e-5)


def test_adamw_equals_the_alias_of_optax(params, gradients):
    optim = config("adamw", clip=0.0)
    share = make_schedule(optim, STEPS)
    mask = tree.unflatten({path: groups.decays(p) for path, p in TABLE.items()})
    alias = optax.adamw(
        lambda i: optim.learning_rate * share(i), optim.b1, optim.b2, optim.epsilon, weight_decay=0.1, mask=mask
    )
    assert_trees_close(run(optim, params, gradients)[0], run_optax(alias, params, gradients), 1e-6)


def layerwise(path: str, value: jax.Array) -> list[jax.Array]:
    """Each weight of a stack as its own two-dim matrix: what optax's Adafactor is compared on."""
    sides = groups.matrix_sides(TABLE[path])
    layers = list(value) if path.startswith("layers/") else [value]
    if sides is None:
        return layers
    inputs = int(np.prod([value.shape[d] for d in sides[0]]))
    return [layer.reshape(inputs, -1) for layer in layers]


def split(values: dict) -> dict:
    return {path: layerwise(path, leaf) for path, leaf in tree.flatten(values).items()}


def test_adafactor_equals_optax_on_each_layer(params, gradients):
    optim = config("adafactor", clip=0.0)
    share = make_schedule(optim, STEPS)
    mask = {path: [groups.decays(TABLE[path])] * len(layers) for path, layers in split(params).items()}
    # optax would factor only above 128 and treats a bias of two dims as a matrix: it sees those flat.
    flat = lambda values: {k: [x if groups.matrix_sides(TABLE[k]) else x.ravel() for x in v] for k, v in values.items()}  # noqa: E731 - short
    expected = run_optax(
        optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=2),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(optim.weight_decay, mask),
            optax.scale_by_learning_rate(lambda i: optim.learning_rate * share(i)),
        ),
        flat(split(params)),
        [flat(split(g)) for g in gradients],
    )
    got = flat(split(run(optim, params, gradients)[0]))
    for path, layers in expected.items():
        for a, b in zip(got[path], layers, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=path)


def test_first_step_of_muon_equals_optax(params, gradients):
    # Later steps differ on purpose: optax mixes a bias-corrected momentum with the gradient, Jordan et al. do not.
    optim, gradients = config("muon", clip=0.0), gradients[:1]
    share = make_schedule(optim, STEPS)
    contrib = optax.contrib
    numbers = {
        path: contrib.MuonDimensionNumbers((1,), (2, 3))
        if path.endswith("q")
        else contrib.MuonDimensionNumbers((1, 2), (3,))
        for path, p in TABLE.items()
        if p.matrix_dims
    }
    matrices = lambda values: {path: leaf for path, leaf in tree.flatten(values).items() if path in numbers}  # noqa: E731 - short
    reference = contrib.muon(
        lambda i: optim.learning_rate * share(i),
        beta=optim.momentum,
        weight_decay=optim.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers,
    )
    expected = run_optax(reference, matrices(params), [matrices(g) for g in gradients])
    rest = dataclasses.replace(optim, name="adamw", learning_rate=optim.adam_learning_rate)
    adam = tree.flatten(run(rest, params, gradients)[0])
    got = tree.flatten(run(optim, params, gradients)[0])
    for path in TABLE:
        np.testing.assert_allclose(got[path], expected.get(path, adam[path]), rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_sharded_equals_one_device(name, mesh, params, gradients):
    optim = config(name)
    expected, expected_state = one_device(optim)
    devices = jax.devices()[: int(np.prod(mesh))]
    with jax.set_mesh(jax.make_mesh(mesh, axes.AXES, devices=devices)):
        shard = lambda values: tree.map_paths(  # noqa: E731 - short
            lambda path, leaf: jax.device_put(leaf, axes.sharding(TABLE[path].axes)), values
        )
        got, state = run(optim, shard(params), [shard(g) for g in gradients])
        for path, leaf in tree.flatten(got).items():
            assert leaf.sharding.spec == tree.flatten(shard(params))[path].sharding.spec
    assert_trees_close(got, expected, 1e-6)
    assert_trees_close(state, expected_state, 1e-5)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("adamw", set()), ("sgd", set()), ("adafactor", {"all-reduce"}), ("muon", {"all-to-all", "all-reduce"})],
)
def test_collectives_of_an_update(name, allowed, params):
    """Nothing is ever gathered: parameters, gradients and state stay where they are stored."""
    with jax.set_mesh(jax.make_mesh((1, 2, 2, 1, 1, 2), axes.AXES)):
        sharded = tree.map_paths(lambda path, leaf: jax.device_put(leaf, axes.sharding(TABLE[path].axes)), params)
        optimizer = make_optimizer(config(name), TABLE, STEPS)
        state = jax.eval_shape(optimizer.init, sharded)
        text = jax.jit(optimizer.update).lower(sharded, state, sharded, jnp.int32(0)).compile().as_text()
    found = set(re.findall(r" (all-[a-z-]+?|reduce-scatter|collective-[a-z]+)(?:-start)?\(", text))
    assert found <= allowed
    assert bool(found) == bool(allowed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_a_plain_dict_sharded_like_the_parameters(name, dtype, params):
    with jax.set_mesh(jax.make_mesh((1, 1, 2, 1, 1, 4), axes.AXES)):
        sharded = tree.map_paths(
            lambda path, leaf: jax.device_put(leaf.astype(dtype), axes.sharding(TABLE[path].axes)), params
        )
        optimizer = make_optimizer(config(name), TABLE, STEPS)
        state = jax.jit(optimizer.init)(sharded)
        after = jax.jit(optimizer.update)(sharded, state, sharded, jnp.int32(0))[1]
        slots = tree.flatten(state)
        for slot, leaf in slots.items():
            assert leaf.dtype == jnp.float32
            assert leaf.sharding == tree.flatten(after)[slot].sharding
            kind, path = slot.split("/", 1)
            expected = axes.spec(*TABLE[path].axes)
            if kind == "inputs":
                expected = P(
                    *(expected[d] for d in range(len(expected)) if d not in groups.matrix_sides(TABLE[path])[1])
                )
            elif kind == "outputs":
                expected = P(
                    *(expected[d] for d in range(len(expected)) if d not in groups.matrix_sides(TABLE[path])[0])
                )
            assert leaf.sharding.is_equivalent_to(
                jax.sharding.NamedSharding(jax.sharding.get_mesh(), expected), leaf.ndim
            )
        # Abstract evaluation, as a restore does it, gives the same shapes and shardings.
        abstract = tree.flatten(jax.eval_shape(optimizer.init, sharded))
        assert {k: (v.shape, v.sharding.spec) for k, v in abstract.items()} == {
            k: (v.shape, v.sharding.spec) for k, v in slots.items()
        }
    expected_slots = {
        "adamw": {f"{slot}/{path}" for slot in ("mu", "nu") for path in TABLE},
        "sgd": {f"momentum/{path}" for path in TABLE},
        "muon": {f"momentum/{path}" for path in TABLE if TABLE[path].matrix_dims}
        | {f"{slot}/{path}" for slot in ("mu", "nu") for path in TABLE if not TABLE[path].matrix_dims},
        "adafactor": {
            f"{slot}/{path}"
            for path in TABLE
            for slot in (("inputs", "outputs") if groups.matrix_sides(TABLE[path]) else ("second_moment",))
        },
    }[name]
    assert slots.keys() == expected_slots
    types = {type(node) for node in jax.tree.leaves(state, is_leaf=lambda n: not isinstance(n, dict))}
    assert all(issubclass(t, jax.Array) for t in types)


def test_adafactor_keeps_the_sides_only(params):
    state = make_optimizer(config("adafactor"), TABLE, STEPS).init(params)
    assert state["inputs"]["layers"]["attention"]["q"].shape == (LAYERS, 8)
    assert state["outputs"]["layers"]["attention"]["q"].shape == (LAYERS, 4, 6)
    assert state["second_moment"]["layers"]["attention"]["bias"].shape == (LAYERS, 4, 6)


@pytest.mark.parametrize("name", NAMES)
def test_state_made_outside_jit_can_be_donated(name, params):
    optimizer = make_optimizer(config(name), TABLE, STEPS)
    gradients, state = draw(1), optimizer.init(params)
    state = jax.jit(optimizer.update, donate_argnums=1)(gradients, state, params, jnp.int32(0))[1]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_plain_sgd_has_no_state(params):
    optimizer = make_optimizer(config("sgd", momentum=0.0, weight_decay=0.0, schedule="constant", warmup=0), TABLE, 5)
    assert optimizer.init(params) == {}
    updates, state = optimizer.update(params, {}, params, 0)
    assert state == {}
    assert_trees_close(updates, jax.tree.map(lambda p: -1e-2 * p, params), 1e-6)


def test_only_weights_decay(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(config("sgd", warmup=0, schedule="constant"), TABLE, STEPS)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params, 0)
    for path, update in tree.flatten(updates).items():
        weight = path in ("embed", "layers/attention/q", "layers/attention/o")
        expected = -1e-2 * 0.1 * tree.flatten(params)[path] if weight else jnp.zeros_like(update)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)


def test_bfloat16_weights_get_float32_updates(params):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    optimizer = make_optimizer(config("adamw"), TABLE, STEPS)
    updates, state = optimizer.update(params, optimizer.init(params), params, jnp.int32(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, state))} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(apply_updates(params, updates))} == {jnp.dtype(jnp.bfloat16)}


def test_other_parameters_are_refused(params):
    optimizer = make_optimizer(config("adamw"), TABLE, STEPS)
    del params["final_norm"]
    with pytest.raises(ValueError, match="final_norm"):
        optimizer.init(params)


def test_learning_rate_is_the_schedule_times_the_peak():
    optim = config("adamw")
    optimizer = make_optimizer(optim, TABLE, STEPS)
    assert float(optimizer.learning_rate(2)) == pytest.approx(1e-2)
    assert float(optimizer.learning_rate(STEPS)) == pytest.approx(1e-3)
