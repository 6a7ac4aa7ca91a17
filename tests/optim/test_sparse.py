"""Row-wise updates against dense arithmetic in NumPy, on one device: duplicates, rows that are none, each rule."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.optim.sparse import SparseRule, merge, update_rows

ROWS, WIDTH, END = 30, 4, 30


def draw(count, seed=0):
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 12, count).astype(np.int32)
    rows[generator.random(count) < 0.3] = END
    return rows, generator.normal(size=(count, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("rows", [[3, 1, 3, END, 0], [END, END], [5], [0, 0, 0]])
def test_merge(rows):
    distinct, place, found = (np.asarray(x) for x in merge(jnp.array(rows, jnp.int32), END))
    real = sorted(set(rows) - {END})
    assert found == len(real)
    assert distinct[: len(real)].tolist() == real
    assert (np.diff(distinct) > 0).all(), "sorted and distinct, fillers too"
    assert (distinct[len(real) :] >= END).all()
    assert [distinct[p] for p, row in zip(place, rows, strict=True) if row < END] == [r for r in rows if r < END]


@pytest.mark.parametrize("name", ["rowwise-adagrad", "adagrad", "sgd"])
def test_three_updates(name):
    rule = SparseRule(name, 1e-3)
    dims = rule.slot_dims()
    table = np.random.default_rng(9).normal(size=(ROWS, WIDTH)).astype(np.float32)
    wanted, slot = table.astype(np.float64), np.zeros((ROWS, WIDTH))
    got = jnp.array(table), None if dims is None else jnp.zeros((ROWS, WIDTH)[:dims])
    for step in range(3):
        rows, gradient = draw(40, step)
        got = update_rows(rule, *got, jnp.array(rows), jnp.array(gradient), jnp.float32(0.2), lambda x: x.mean(-1))
        dense = np.zeros((ROWS, WIDTH))
        np.add.at(dense, rows[rows < END], gradient[rows < END])
        square = dense**2
        slot += square.mean(1, keepdims=True) if name == "rowwise-adagrad" else square
        wanted -= 0.2 * dense / (1 if name == "sgd" else np.sqrt(slot) + 1e-3)
    np.testing.assert_allclose(got[0], wanted, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(got[0])[12:], table[12:])
    if dims is not None:
        np.testing.assert_allclose(got[1], slot[:, 0] if dims == 1 else slot, rtol=1e-5)
