"""Tables split over devices against one NumPy table for each feature: lookups, bags, and the rows after an update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes
from jaxscale.optim.sparse import SparseRule
from jaxscale.parallel.table import make_groups
from jaxscale.parallel.table_layout import Bags, Feature, position

FEATURES = (Feature(700, 1), Feature(3, 2), Feature(50, 3), Feature(1, 1), Feature(900, 1))
BAGS = Bags(FEATURES)
WIDTH, ROWS = 16, 24
MESHES = {"one": {}, "rows": {"data": 2, "fsdp": 2, "expert": 2}, "tensor": {"fsdp": 4, "tensor": 2}}
RATE, EPSILON, BEFORE = 0.5, 1e-3, 0.1
"""BEFORE: what all accumulators hold at the start."""


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values()))) if sizes else 1
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[:count])


def draw(seed=0):
    """Few distinct ids and many of them often: rows come from several devices and several times from one."""
    generator = np.random.default_rng(seed)
    ids = np.concatenate(
        [np.minimum(generator.geometric(0.2, (ROWS, f.hots)) - 1, f.rows - 1) for f in FEATURES], axis=1
    ).astype(np.int32)
    ids[:, 1:] = np.where(generator.random((ROWS, ids.shape[1] - 1)) < 0.2, -1, ids[:, 1:])
    ids[0] = -1  # an example without any id
    tables = [generator.normal(size=(f.rows, WIDTH)).astype(np.float32) for f in FEATURES]
    gradient = generator.normal(size=(ROWS, len(FEATURES), WIDTH)).astype(np.float32)
    return ids, tables, gradient


def plain(ids, tables, gradient, pooling, rule):
    """The same by loops over examples, in float64: bags, tables and dense accumulators after one update."""
    bags = np.zeros(gradient.shape)
    dense = [np.zeros(table.shape) for table in tables]
    for b in range(ROWS):
        for f, (start, stop) in enumerate(BAGS.spans):
            real = [i for i in ids[b, start:stop] if i >= 0]
            for i in real:
                share = 1 / len(real) if pooling == "mean" else 1
                bags[b, f] += share * tables[f][i]
                dense[f][i] += share * gradient[b, f].astype(np.float64)
    out, slots = [], []
    for table, grad in zip(tables, dense, strict=True):
        square = {"rowwise-adagrad": (grad**2).mean(1, keepdims=True), "adagrad": grad**2, "sgd": None}[rule]
        root = 1 if square is None else np.sqrt(BEFORE + square) + EPSILON
        out.append(table - RATE * grad / root)
        slots.append(None if square is None else np.broadcast_to(BEFORE + square, table.shape))
    return bags, out, slots


def whole(groups, tables):
    """The arrays of the groups with these tables in them, by the position that `table_layout` gives each row."""
    arrays = []
    for group, features in groups:
        array = np.zeros(group.parameter.shape, np.float32)
        for number, feature in enumerate(features):
            for row in range(FEATURES[feature].rows):
                at = position(group.bags, group.placement, group.bins, number, row)
                array[(at.bin, at.row) if group.placement == "table" else at.row] = tables[feature][row]
        arrays.append(array)
    return arrays


def parts(groups, arrays, width):
    """The way back: one table for each feature."""
    tables = [None] * len(FEATURES)
    for (group, features), array in zip(groups, arrays, strict=True):
        for number, feature in enumerate(features):
            places = [
                position(group.bags, group.placement, group.bins, number, r) for r in range(FEATURES[feature].rows)
            ]
            rows = [array[(p.bin, p.row) if group.placement == "table" else p.row] for p in places]
            tables[feature] = np.stack([np.broadcast_to(row, (width,)) for row in rows])
    return tables


def full_slot(group, names):
    shape = group.parameter.shape[: len(names)]
    return jnp.full(shape, BEFORE, jnp.float32, out_sharding=axes.spec(*names))


def run(sizes, placements, pooling="sum", rule="rowwise-adagrad", factor=0.0):
    ids, tables, gradient = draw()
    made, order = make_groups(
        placements, BAGS, width=WIDTH, pooling=pooling, bins=8, factor=factor, compute=jnp.float32
    )
    groups = [(g, [f for f, p in enumerate(placements) if p == g.placement]) for g in made]
    sparse = SparseRule(rule, EPSILON)
    dims = sparse.slot_dims()
    with jax.set_mesh(mesh_of(sizes)):
        arrays = [
            jax.device_put(a, axes.sharding(g.parameter.axes))
            for (g, _), a in zip(groups, whole(groups, tables), strict=True)
        ]
        slots = [None if dims is None else full_slot(g, g.slot_axes(dims)) for g, _ in groups]
        put = jax.device_put(ids, axes.sharding(("act_batch", None)))
        put_gradient = jax.device_put(gradient, axes.sharding(("act_batch", None, None)))

        @jax.jit
        def both(arrays, slots, ids, gradient):
            found, counts, updated = [], [], []
            for (group, features), array, slot in zip(groups, arrays, slots, strict=True):
                bags, count = group.look_up(array, ids)
                mine = jnp.stack([gradient[:, f] for f in features], axis=1)
                found.append(bags)
                counts.append(count)
                updated.append(group.update(sparse, array, slot, ids, mine, jnp.float32(RATE)))
            return found, counts, updated

        found, counts, updated = jax.device_get(both(arrays, slots, put, put_gradient))
    bags = np.concatenate(found, axis=1)[:, order]
    new = parts(groups, [np.asarray(table) for table, _ in updated], WIDTH)
    new_slots = None if dims is None else parts(groups, [np.asarray(slot) for _, slot in updated], WIDTH)
    return bags, new, new_slots, counts


MIXED = ("row", "table", "column", "table", "row")


def check(got, pooling="sum", rule="rowwise-adagrad"):
    ids, tables, gradient = draw()
    bags, new, slots = plain(ids, tables, gradient, pooling, rule)
    found, updated, accumulators, _ = got
    np.testing.assert_allclose(found, bags, atol=2e-6)
    for f, table in enumerate(tables):
        np.testing.assert_allclose(updated[f], new[f], atol=3e-6)
        touched = {int(i) for i in ids[:, slice(*BAGS.spans[f])].ravel() if i >= 0}
        for row in set(range(len(table))) - touched:
            np.testing.assert_array_equal(updated[f][row], table[row])
        if accumulators is not None:
            np.testing.assert_allclose(accumulators[f], slots[f], rtol=2e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_lookup_and_update(mesh):
    check(run(MESHES[mesh], MIXED))


@pytest.mark.parametrize("rule", ["adagrad", "sgd"])
def test_means_and_other_rules(rule):
    check(run(MESHES["tensor"], MIXED, "mean", rule), "mean", rule)


@pytest.mark.parametrize("factor", [0.05, 0.5])
def test_several_rounds_drop_nothing(factor):
    """Room for one id an owner, or for a few: a round for each, and the same result."""
    got = run(MESHES["rows"], ("row",) * 5, factor=factor)
    check(got)
    ids = draw()[0]
    (counts,) = got[3]
    assert counts["table_ids"] == (ids >= 0).sum()
    # Of each of the 8 devices by itself.
    own = [{(BAGS.feature_of[h], i) for row in part for h, i in enumerate(row) if i >= 0} for part in np.split(ids, 8)]
    assert counts["table_unique"] == sum(map(len, own))
    assert counts["table_rounds"] > 1
