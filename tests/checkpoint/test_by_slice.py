"""A state whose arrays have a part for each slice, read where there are more or fewer slices."""

import jax
import numpy as np
import pytest

from jaxscale import axes, tree
from jaxscale.checkpoint.by_slice import as_stored, dealt
from jaxscale.checkpoint.compare import describe


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[: int(np.prod(shape))])


SPECS = {
    "params/w": jax.P("fsdp"),
    "across/residual/w": jax.P("data", "fsdp"),
    "local/params/w": jax.P("data", "fsdp"),
    "local/opt/mu/w": jax.P("data", "fsdp"),
}


def state_of(slices):
    """Values by path, and where they lie on a mesh of so many slices."""
    mesh = mesh_of(data=slices, fsdp=2)
    generator = np.random.default_rng(slices)
    values = {
        path: generator.integers(1, 100, (*([slices] if len(spec) == 2 else []), 4)).astype(np.float32)
        for path, spec in SPECS.items()
    }
    shardings = {path: jax.NamedSharding(mesh, spec) for path, spec in SPECS.items()}
    return values, shardings


def read(before, after):
    values, _ = state_of(before)
    shapes, shardings = state_of(after)
    abstract = tree.unflatten(
        {p: jax.ShapeDtypeStruct(shapes[p].shape, np.float32, sharding=shardings[p]) for p in SPECS}
    )
    stored = as_stored(abstract, {path: (value.shape, "float32") for path, value in values.items()})
    assert describe(stored) == {path: (value.shape, "float32") for path, value in values.items()}
    loaded = tree.unflatten(
        {path: jax.device_put(values[path], leaf.sharding) for path, leaf in tree.flatten(stored).items()}
    )
    found = tree.flatten(dealt(loaded, abstract))
    for path, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
        assert leaf.shape == shapes[path].shape
    return values, {path: np.asarray(leaf) for path, leaf in found.items()}


def test_as_many_slices_as_before():
    values, found = read(2, 2)
    for path in SPECS:
        np.testing.assert_array_equal(found[path], values[path])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (4, 2), (3, 2)])
def test_slices_leave(before, after):
    values, found = read(before, after)
    residual = values["across/residual/w"]
    wanted = [sum(residual[s] for s in range(before) if s % after == one) for one in range(after)]
    np.testing.assert_array_equal(found["across/residual/w"], np.stack(wanted))
    for path in ("local/params/w", "local/opt/mu/w"):
        np.testing.assert_array_equal(found[path], values[path][:after])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4)])
def test_slices_join(before, after):
    values, found = read(before, after)
    new = after - before
    residual = np.concatenate([values["across/residual/w"], np.zeros((new, 4))])
    np.testing.assert_array_equal(found["across/residual/w"], residual)
    joined = np.concatenate([values["local/params/w"], np.stack([values["params/w"]] * new)])
    np.testing.assert_array_equal(found["local/params/w"], joined)
    mean = values["local/opt/mu/w"].mean(0)
    np.testing.assert_array_equal(found["local/opt/mu/w"][before:], np.stack([mean] * new))


def test_other_arrays_must_fit():
    leaf = jax.ShapeDtypeStruct((2, 4), np.float32, sharding=jax.NamedSharding(mesh_of(data=2), jax.P("data")))
    kept = as_stored(
        {"opt": {"w": leaf}, "across": {"residual": {"w": leaf}}},
        {"opt/w": ((3, 4), "float32"), "across/residual/w": ((3, 5), "float32")},
    )
    assert kept["opt"]["w"].shape == kept["across"]["residual"]["w"].shape == (2, 4)
