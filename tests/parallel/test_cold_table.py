"""A table in the host's memory with a small cache on the devices against the same table wholly on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes
from jaxscale.optim.sparse import SparseRule
from jaxscale.parallel.cold_table import CacheTooSmall, ColdTable

ROWS, WIDTH, BATCH, HOTS, CACHE = 500, 8, 16, 2, 60
RULE = SparseRule("rowwise-adagrad", 1e-6)


@pytest.fixture(autouse=True, name="mesh")
def _mesh():
    sizes = {"fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    with jax.set_mesh(jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:4])):
        yield


def batches(count, start=0):
    for number in range(start, start + count):
        generator = np.random.default_rng(number)
        ids = np.minimum(generator.zipf(1.2, (BATCH, HOTS)) - 1, ROWS - 1).astype(np.int32)
        ids[generator.random(ids.shape) < 0.1] = -1
        yield ids, generator.normal(size=(BATCH, 1, WIDTH)).astype(np.float32)


def start():
    return np.random.default_rng(99).normal(size=(ROWS, WIDTH)).astype(np.float32)


def train(table, steps):
    """Bags of each step."""

    def one(device, ids, gradient):
        bags, _ = table.group.look_up(device["weights"], ids)
        weights, slot = table.group.update(
            RULE, device["weights"], device["accumulator"], ids, gradient, jnp.float32(0.3)
        )
        return bags, {"weights": weights, "accumulator": slot}

    step, seen = jax.jit(one, donate_argnums=0), []
    for ids, gradient in steps:
        places = jax.device_put(table.prepare(ids), axes.sharding(("act_batch", None)))
        bags, table.device = step(
            table.device, places, jax.device_put(gradient, axes.sharding(("act_batch", None, None)))
        )
        seen.append(np.asarray(bags))
    return seen


@pytest.fixture(name="whole")
def _whole():
    """A cache that holds everything is the table itself. (bags of 12 steps, the state after them)"""
    table = ColdTable(start(), RULE, ROWS, hots=HOTS)
    return train(table, batches(12)), {name: value.copy() for name, value in table.state().items()}


def test_a_small_cache_changes_nothing(whole):
    table = ColdTable(start(), RULE, CACHE, hots=HOTS)
    seen = train(table, batches(12))
    assert table.moved > CACHE, "rows went back and others came in"
    assert table.device["weights"].shape[0] >= CACHE
    np.testing.assert_array_equal(seen, whole[0])
    for name, value in table.state().items():
        np.testing.assert_array_equal(value, whole[1][name])


def test_the_first_batch_against_plain_numpy():
    ids, gradient = next(batches(1))
    table = ColdTable(start(), RULE, CACHE, hots=HOTS)
    (bags,) = train(table, [(ids, gradient)])
    weights, dense = start().astype(np.float64), np.zeros((ROWS, WIDTH))
    for b in range(BATCH):
        real = [i for i in ids[b] if i >= 0]
        np.testing.assert_allclose(bags[b, 0], weights[real].sum(0), atol=1e-5)
        for i in real:
            dense[i] += gradient[b, 0]
    mean = (dense**2).mean(1)
    wanted = weights - 0.3 * dense / (np.sqrt(mean) + RULE.epsilon)[:, None]
    state = table.state()
    np.testing.assert_allclose(state["weights"], wanted, atol=1e-5)
    np.testing.assert_allclose(state["accumulator"], mean, rtol=1e-5)


def test_the_rows_used_most_stay():
    table = ColdTable(start(), RULE, 4, hots=1)
    for ids in ([0, 0, 0, 1], [1, 2, 2, 3], [3, 4, 3, 3]):
        table.prepare(np.array(ids)[:, None])
    moved = table.moved
    assert table.prepare(np.array([[0], [3]])).min() >= 0
    assert table.moved == moved == 5
    table.prepare(np.array([[2], [1]]))  # of 1 and 2, used twice each, 1 was the first to go
    assert table.moved == moved + 1


def test_a_checkpoint_goes_on_with_another_cache(whole):
    table = ColdTable(start(), RULE, CACHE, hots=HOTS)
    train(table, batches(6))
    saved = {name: value.copy() for name, value in table.state().items()}
    other = ColdTable(np.zeros((ROWS, WIDTH), np.float32), RULE, CACHE + 30, hots=HOTS)
    other.restore(saved)
    np.testing.assert_array_equal(train(other, batches(6, start=6)), whole[0][6:])
    for name, value in other.state().items():
        np.testing.assert_array_equal(value, whole[1][name])
    with pytest.raises(ValueError, match=r"uses of the saved table is not there, this table wants \(500,\)"):
        other.restore({name: value for name, value in saved.items() if name != "uses"})


def test_a_batch_that_does_not_fit_is_refused_and_moves_nothing():
    table = ColdTable(start(), RULE, 3, hots=1)
    with pytest.raises(CacheTooSmall, match="the batch has 4 distinct ids, the cache 3 rows"):
        table.prepare(np.arange(4)[:, None])
    assert table.moved == 0
