"""Small states and records for the checkpoint tests."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import config, tree
from jaxscale.axes import AXES
from jaxscale.train.protocols import Record

SPECS = {
    "params/embed": P(None, "fsdp"),
    "params/layers/mlp": P(None, "fsdp", "tensor"),
    "params/norm": P(),
    "params/scale": P("fsdp"),
    "opt/mu/embed": P(None, "fsdp"),
    "opt/mu/layers/mlp": P(None, "fsdp", "tensor"),
    "opt/count": P(),
    "ema/embed": P(None, "fsdp"),
    "guard/window": P(),
    "skipped": P(),
    "key": P(),
}
SHAPES = {
    "params/embed": ((16, 32), "float32"),
    "params/layers/mlp": ((3, 16, 8), "float32"),
    "params/norm": ((5,), "float32"),
    "params/scale": ((16,), "bfloat16"),
    "opt/mu/embed": ((16, 32), "float32"),
    "opt/mu/layers/mlp": ((3, 16, 8), "float32"),
    "opt/count": ((), "int32"),
    "ema/embed": ((16, 32), "float32"),
    "guard/window": ((8,), "float32"),
    "skipped": ((), "int32"),
    "key": ((2,), "uint32"),
}


def make_mesh(devices=None, **sizes):
    """A six-axis mesh over the first devices that the sizes need."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = (devices or jax.devices())[: int(np.prod(shape))]
    return jax.sharding.Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def make_abstract(mesh, shapes=SHAPES):
    """ShapeDtypeStructs with shardings on the mesh."""
    return tree.unflatten(
        {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, SPECS[path]))
            for path, (shape, dtype) in shapes.items()
        }
    )


def make_values(seed, flipped=""):
    """{path: numpy array} of random bits, so that NaNs and denormals are among them; one bit differs at `flipped`."""
    random = np.random.default_rng(seed)
    values = {}
    for path, (shape, dtype) in SHAPES.items():
        size = jnp.dtype(dtype).itemsize * int(np.prod(shape, dtype=int))
        values[path] = np.frombuffer(_flip(random.bytes(size), path == flipped), dtype=jnp.dtype(dtype)).reshape(shape)
    return values


def _flip(data, wanted):
    return bytes([data[0] ^ 1]) + data[1:] if wanted else data


def make_state(mesh, seed=0, flipped=""):
    """A state on the mesh; the same bits on every mesh and number of processes."""
    leaves = {}
    for path, value in make_values(seed, flipped).items():
        sharding = NamedSharding(mesh, SPECS[path])
        leaves[path] = jax.make_array_from_callback(value.shape, sharding, lambda index, value=value: value[index])
    return tree.unflatten(leaves)


def same_bits(state, seed):
    """Paths whose local shards differ from `make_values(seed)` in any bit."""
    wrong = []
    values = make_values(seed)
    leaves = tree.flatten(state)
    if leaves.keys() != values.keys():
        return sorted(leaves.keys() ^ values.keys())
    for path, leaf in leaves.items():
        for shard in leaf.addressable_shards:
            if np.asarray(shard.data).tobytes() != np.ascontiguousarray(values[path][shard.index]).tobytes():
                wrong.append(path)
                break
    return wrong


def make_record(step, **changes):
    fields = {
        "step": step,
        "row": step * 8,
        "config": config.to_dict(config.Config("test", config.ModelConfig())),
        "data": {"tokenizer": "abc", "sources": {"a": "123"}},
        "environment": {"packages": {"jax": "1"}, "git": {}},
        "metrics_line": {"step": step, "epoch": 1, "loss": 1.5, "grad_norm": float("inf")},
        "best": {"loss": 1.25},
        "epoch": 2,
    }
    return Record(**(fields | changes))
