"""Dealing matrices out: the choice of a layout, and that the moves lose nothing whatever the layout."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.optim.deal import Layout, choose_layout, from_layout, to_layout
from jaxscale.optim.muon import newton_schulz

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
SPECS = {  # storage of (stack, short, long)
    "fsdp-short-tensor-long": P(None, "fsdp", "tensor"),
    "both-short": P(None, ("fsdp", "tensor"), None),
    "both-long": P(None, None, ("tensor", "fsdp")),
    "stack-and-short": P("tensor", "fsdp", None),
}


def placed(spec: P) -> dict:
    sides = {}
    for side, entry in zip(("stack", "short", "long"), spec, strict=True):
        sides.update(dict.fromkeys((entry,) if isinstance(entry, str) else entry or (), side))
    return sides


def layouts(spec: P) -> list[Layout]:
    """All layouts that the moves can make, not only those that some size makes cheapest."""
    sides = placed(spec)
    jobs = {None: ("deal", "long", "idle"), "short": ("deal", "long"), "long": ("deal", "long"), "stack": ("idle",)}
    found = []
    for chosen in itertools.product(*(jobs[sides.get(axis)] for axis in SIZES)):
        deal, long = (tuple(a for a, job in zip(SIZES, chosen, strict=True) if job == j) for j in ("deal", "long"))
        found.append(Layout(deal, long, sides, SIZES))
    return found


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_layout_brings_everything_back_and_iterates_the_same(spec):
    stack = 6 if spec[0] else 3  # 3 does not divide: padded
    x = np.random.default_rng(0).normal(size=(stack, 4, 16)).astype(np.float32)
    expected = newton_schulz(jnp.asarray(x))
    assert len(layouts(spec)) >= 6
    with jax.set_mesh(jax.make_mesh((1, 2, 2, 1, 1, 2), axes.AXES)):
        sharded = jax.device_put(x, spec)

        @jax.jit
        def all_layouts(x):
            def moved(layout):
                def kernel(x):
                    there = to_layout(x, layout)
                    assert there.shape == (
                        -(-x.shape[0] // layout.dealt_over),
                        4,
                        16 // math.prod(SIZES[a] for a in layout.long),
                    )
                    back = from_layout(there, layout, x.shape[0])
                    return back, from_layout(newton_schulz(there, layout.long), layout, x.shape[0])

                return jax.shard_map(kernel, in_specs=spec, out_specs=spec)(x)

            return [moved(layout) for layout in layouts(spec)]

        for layout, (back, done) in zip(layouts(spec), all_layouts(sharded), strict=True):
            np.testing.assert_array_equal(back, x, err_msg=str(layout))
            np.testing.assert_allclose(done, expected, atol=1e-5, err_msg=str(layout))


def test_stacks_that_fill_the_devices_are_dealt_out():
    layout = choose_layout(80, 8192, 8192, {"fsdp": "short"}, {"fsdp": 8})
    assert (layout.deal, layout.long) == (("fsdp",), ())


def test_more_devices_than_matrices_share_the_long_side():
    layout = choose_layout(80, 8192, 28672, {"fsdp": "short", "tensor": "long"}, {"fsdp": 128, "tensor": 4})
    assert (layout.deal, layout.long) == (("fsdp",), ("tensor",))


def test_little_matrices_stay_within_a_slice():
    # Gathering the result over the slow data axis costs more than doing the same twice.
    layout = choose_layout(4, 256, 1024, {"fsdp": "short", "tensor": "long"}, {"data": 2, "fsdp": 2, "tensor": 2})
    assert "data" not in layout.deal + layout.long


def test_an_axis_that_shards_the_stack_stays_there():
    layout = choose_layout(8, 64, 128, {"expert": "stack", "fsdp": "short"}, {"expert": 4, "fsdp": 2})
    assert "expert" not in layout.deal + layout.long


@pytest.mark.parametrize("stack", [1, 3, 7])
@pytest.mark.parametrize("short", [5, 8])
def test_always_succeeds_and_never_gathers(stack, short):
    for sides in ({}, {"fsdp": "short"}, {"fsdp": "long", "tensor": "short"}):
        layout = choose_layout(stack, short, 15, sides, {"data": 2, "fsdp": 4, "tensor": 3})
        assert set(sides) <= {*layout.deal, *layout.long}
        assert 15 % math.prod(layout.sizes[a] for a in layout.long) == 0


def test_moves_of_one_device_are_nothing():
    layout = choose_layout(3, 4, 8, {}, {})
    assert (layout.deal, layout.long, layout.dealt_over) == ((), (), 1)
    x = jnp.arange(96.0).reshape(3, 4, 8)
    np.testing.assert_array_equal(from_layout(to_layout(x, layout), layout, 3), x)
