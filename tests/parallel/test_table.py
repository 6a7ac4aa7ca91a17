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
        found, counts, updated = [], [], []
        for (group, features), array, slot in zip(groups, arrays, slots, strict=True):
            bags, count = jax.jit(group.look_up)(array, put)
            mine = jax.device_put(gradient[:, features], axes.sharding(("act_batch", None, None)))
            updated.append(
                jax.jit(lambda a, s, i, g, group=group: group.update(sparse, a, s, i, g, jnp.float32(RATE)))(
                    array, slot, put, mine
                )
            )
            found.append(np.asarray(bags))
            counts.append({name: float(value) for name, value in count.items()})
    bags = np.concatenate(found, axis=1)[:, order]
    new = parts(groups, [np.asarray(table) for table, _ in updated], WIDTH)
    new_slots = None if dims is None else parts(groups, [np.asarray(slot) for _, slot in updated], WIDTH)
    return bags, new, new_slots, counts


EACH = {"row": ("row",) * 5, "column": ("column",) * 5, "table": ("table",) * 5}
EACH["mixed"] = ("row", "table", "column", "table", "row")


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


@pytest.mark.parametrize("placement", EACH)
@pytest.mark.parametrize("mesh", MESHES)
def test_lookup_and_update(mesh, placement):
    check(run(MESHES[mesh], EACH[placement]))
