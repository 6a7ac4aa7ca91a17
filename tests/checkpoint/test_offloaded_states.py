"""States that lie in the hosts' memory: both tiers take them and bring them back there, or anywhere else."""

import jax
import pytest
from jax.sharding import NamedSharding
from states import make_abstract, make_mesh, make_record, make_state, same_bits
from test_assemble import fetch, snapshot

from jaxscale import tree
from jaxscale.checkpoint.assemble import assemble
from jaxscale.checkpoint.durable import DurableCheckpoints
from jaxscale.checkpoint.restore import restore
from jaxscale.host_memory import HOST

MOVED = ("opt/mu", "ema", "params/layers")


def on_host(values):
    """The same arrays or shapes, those of MOVED in the hosts' memory."""

    def place(path, leaf):
        if not path.startswith(MOVED):
            return leaf
        sharding = leaf.sharding.with_memory_kind(HOST)
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return leaf.update(sharding=sharding) if is_shape else jax.device_put(leaf, sharding)

    return tree.unflatten({path: place(path, leaf) for path, leaf in tree.flatten(values).items()})


def memory(folder, state, wanted):
    return assemble(wanted, snapshot(folder, state, 5), fetch)


def durable(folder, state, wanted):
    checkpoints = DurableCheckpoints(folder, every=1, keep=3)
    checkpoints.offer(5, state, make_record(5), final=True)
    checkpoints.close()
    return restore(folder, 5, wanted)[0]


def test_an_abstract_mesh_stands_for_the_current_one(tmp_path):
    """As of `abstract_state`, from which supervised workers restore."""
    mesh = make_mesh(data=2, fsdp=4)

    def abstract(leaf):
        return leaf.update(
            sharding=NamedSharding(mesh.abstract_mesh, leaf.sharding.spec, memory_kind=leaf.sharding.memory_kind)
        )

    state = make_state(make_mesh(fsdp=2, tensor=2), seed=3)
    with jax.set_mesh(mesh):
        found = memory(tmp_path, state, jax.tree.map(abstract, on_host(make_abstract(mesh))))
    for path, leaf in tree.flatten(found).items():
        assert leaf.sharding.memory_kind == (HOST if path.startswith(MOVED) else "device"), path


@pytest.mark.parametrize("tier", [memory, durable])
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)], ids=str)
def test_round_trip(tier, before, after, tmp_path):
    """Onto another mesh, with the state's memories before and after."""
    state, wanted = make_state(make_mesh(fsdp=2, tensor=2), seed=3), make_abstract(make_mesh(data=2, fsdp=4))
    state = on_host(state) if before else state
    wanted = on_host(wanted) if after else wanted
    found = tier(tmp_path, state, wanted)
    assert same_bits(found, 3) == []
    for path, leaf in tree.flatten(found).items():
        assert leaf.sharding.memory_kind == (HOST if after and path.startswith(MOVED) else "device"), path
    step = jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)
    assert same_bits(step(found), 3) == []
