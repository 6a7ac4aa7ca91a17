"""Newton-Schulz: its mathematics, its sharding, and what it may send between devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.optim import groups
from jaxscale.optim.muon import COEFFICIENTS, Muon, newton_schulz, orthogonalise, planned
from jaxscale.task import Parameter

MESHES = {"fsdp8": (1, 1, 8, 1, 1, 1), "data2-fsdp2-tensor2": (1, 2, 2, 1, 1, 2), "tensor4": (1, 1, 1, 1, 1, 4)}
WEIGHTS = {
    "q": (("layers", "embed", "heads", "head_dim"), (16, 8, 4), (1, 2)),
    "o": (("layers", "heads", "head_dim", "embed"), (8, 4, 16), (2, 1)),
    "down": (("layers", "mlp", "embed"), (32, 16), (1, 1)),
}


def parameter(kind: str, layers: int) -> Parameter:
    names, shape, matrix_dims = WEIGHTS[kind]
    return Parameter((layers, *shape), names, matrix_dims=matrix_dims)


def in_float64(x_NMN: np.ndarray) -> np.ndarray:
    """The definition, one matrix at a time."""
    a, b, c = COEFFICIENTS
    out = []
    for x in np.asarray(x_NMN, np.float64):
        y = (x.T if x.shape[0] > x.shape[1] else x) / np.linalg.norm(x)
        for _ in range(5):
            gram = y @ y.T
            y = a * y + (b * gram + c * gram @ gram) @ y
        out.append(y.T if x.shape[0] > x.shape[1] else y)
    return np.stack(out)


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_definition(x: np.ndarray, matrix_dims: tuple[int, int]) -> np.ndarray:
    columns = math.prod(x.shape[-matrix_dims[1] :])
    rows = math.prod(x.shape[-sum(matrix_dims) : -matrix_dims[1]])
    return in_float64(x.reshape(-1, rows, columns)).reshape(x.shape)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_singular_values_are_near_one_and_vectors_stay(shape):
    x = draw(shape)
    done = np.asarray(orthogonalise(jnp.asarray(x), (1, 1)), np.float64)
    for before, after in zip(np.asarray(x, np.float64), done, strict=True):
        u, s, vt = np.linalg.svd(before, full_matrices=False)
        in_basis = u.T @ after @ vt.T
        values = np.diag(in_basis)
        np.testing.assert_allclose(in_basis, np.diag(values), atol=1e-4)  # same singular vectors
        well_conditioned = s / np.linalg.norm(s) > 0.02
        assert well_conditioned.sum() >= 7
        assert (np.abs(values[well_conditioned] - 1) < 0.35).all()


def test_equals_the_definition_and_leaves_zeros():
    x = draw((3, 8, 24))
    np.testing.assert_allclose(newton_schulz(jnp.asarray(x)), in_float64(x), atol=1e-5)
    assert not newton_schulz(jnp.zeros((1, 4, 4))).any()


def test_direction_has_the_size_of_adamw_and_looks_ahead():
    rule = Muon(0.95, (1, 2))
    gradients = [jnp.asarray(draw((2, 32, 4, 16), seed)) for seed in range(3)]
    slots, momentum = rule.init(gradients[0]), np.zeros((2, 32, 4, 16))
    for i, gradient in enumerate(gradients):
        direction, slots = rule.direction(gradient, slots, jnp.int32(i))
        momentum = 0.95 * momentum + np.asarray(gradient, np.float64)
        ahead = np.asarray(gradient, np.float64) + 0.95 * momentum
        expected = 0.2 * math.sqrt(64) * by_definition(ahead, (1, 2))
        np.testing.assert_allclose(direction, expected, atol=1e-4)
    np.testing.assert_allclose(slots["momentum"], momentum, rtol=1e-5, atol=1e-5)
    assert float(jnp.sqrt(jnp.mean(direction**2))) == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("layers", [3, 4, 8])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_sharded_equals_one_device_and_never_gathers(mesh, layers):
    """Newton-Schulz of every kind of weight, and all collectives of its compiled program."""
    kinds = {kind: parameter(kind, layers) for kind in WEIGHTS}
    x = {kind: draw(p.shape) for kind, p in kinds.items()}
    with jax.set_mesh(jax.make_mesh(mesh, axes.AXES, devices=jax.devices()[: math.prod(mesh)])):
        sharded = {kind: jax.device_put(value, axes.sharding(kinds[kind].axes)) for kind, value in x.items()}
        all_kinds = jax.jit(lambda x: {kind: orthogonalise(x[kind], p.matrix_dims) for kind, p in kinds.items()})
        compiled = all_kinds.lower(sharded).compile()
        done = compiled(sharded)
        for kind, p in kinds.items():
            assert done[kind].sharding.spec == sharded[kind].sharding.spec
            np.testing.assert_allclose(done[kind], by_definition(x[kind], p.matrix_dims), atol=1e-5, err_msg=kind)
        # All kinds have the same number of elements and the same short side, so one bound holds for each.
        assert_moves_little(compiled.as_text(), kinds["q"], sharded["q"])


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (P("expert", "fsdp", None), 4),  # a sharded stack
        (P(None, None, ("fsdp", "expert")), 3),  # two axes on one dim
        (P(None, ("fsdp", "expert"), "tensor"), 2),
    ],
    ids=str,
)
def test_any_sharding(spec, layers):
    x = draw((layers, 8, 24))
    with jax.set_mesh(jax.make_mesh((1, 1, 2, 2, 1, 2), axes.AXES)):
        done = jax.jit(orthogonalise, static_argnums=1)(jax.device_put(x, spec), (1, 1))
        assert done.sharding.spec == spec
    np.testing.assert_allclose(done, by_definition(x, (1, 1)), atol=1e-5)


def test_sharded_minor_dims_only_permute():
    """head_dim sharded although heads come first: blocks flatten in another order than the whole."""
    x = draw((3, 16, 3, 8))
    with jax.set_mesh(jax.make_mesh((1, 1, 2, 1, 1, 4), axes.AXES)):
        done = jax.jit(orthogonalise, static_argnums=1)(jax.device_put(x, P(None, "fsdp", None, "tensor")), (1, 2))
    np.testing.assert_allclose(done, by_definition(x, (1, 2)), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spec", "deal", "long"),
    [
        ((1, 2, 512), P(None, None, "fsdp"), (), ("fsdp",)),
        ((2, 512, 4), P(None, "fsdp", "tensor"), ("tensor",), ("fsdp",)),
    ],
    ids=str,
)
def test_few_long_matrices_are_shared_by_their_long_side(shape, spec, deal, long):
    x, sizes = draw(shape), {"fsdp": 4, "tensor": 2}
    by_dim = tuple((axis,) if axis else () for axis in spec)
    layout = planned(shape, by_dim, (1, 1), sizes)
    assert (layout.deal, layout.long) == (deal, long)
    with jax.set_mesh(jax.make_mesh((1, 1, 4, 1, 1, 2), axes.AXES)):
        sharded = jax.device_put(x, spec)
        compiled = jax.jit(orthogonalise, static_argnums=1).lower(sharded, (1, 1)).compile()
        done = compiled(sharded)
        assert done.sharding.spec == spec
    np.testing.assert_allclose(done, by_definition(x, (1, 1)), atol=1e-5)
    sums = [elements(m["shapes"]) for m in COLLECTIVE.finditer(compiled.as_text()) if m["name"] == "all-reduce"]
    assert max(sums) <= shape[0] * min(shape[1:]) ** 2  # Gram matrices, never columns


def test_a_mesh_of_one_device():
    """Specs name axes of size 1 there: sharded in name only."""
    x = draw((3, 8, 24))
    with jax.set_mesh(jax.make_mesh((1,) * 6, axes.AXES, devices=jax.devices()[:1])):
        done = jax.jit(orthogonalise, static_argnums=1)(jax.device_put(x, P(None, "fsdp", "tensor")), (1, 1))
    np.testing.assert_allclose(done, by_definition(x, (1, 1)), atol=1e-5)


def test_lowers_at_full_size_without_devices():
    mesh = axes.abstract_mesh({"fsdp": 64, "tensor": 8})
    with jax.sharding.use_abstract_mesh(mesh):
        sharding = axes.sharding(("layers", "embed", "mlp"), mesh)
        x = jax.ShapeDtypeStruct((80, 8192, 28672), jnp.float32, sharding=sharding)
        out = jax.eval_shape(lambda x: orthogonalise(x, (1, 1)), x)
    assert out.sharding.spec == sharding.spec


def test_replicas_share_the_work_and_gather_only_what_each_stores():
    p = Parameter((8, 4096, 4096), ("layers", "embed", "mlp"), matrix_dims=(1, 1))
    with jax.set_mesh(jax.make_mesh((1, 2, 2, 1, 1, 2), axes.AXES)):
        x = jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=axes.sharding(p.axes))
        layout = planned(p.shape, ((), ("fsdp",), ("tensor",)), (1, 1), {"data": 2, "fsdp": 2, "tensor": 2})
        assert layout.deal == ("data", "fsdp", "tensor")
        text = jax.jit(orthogonalise, static_argnums=1).lower(x, (1, 1)).compile().as_text()
    found = [(m["name"], elements(m["shapes"])) for m in COLLECTIVE.finditer(text)]
    assert {name for name, _ in found} == {"all-to-all", "all-gather"}
    stored = math.prod(p.shape) // 4
    assert max(size for name, size in found if name == "all-gather") == stored
    assert max(size for name, size in found if name == "all-to-all") == math.prod(p.shape) // 8


COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) "
    r"(?P<name>all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)


def assert_moves_little(text: str, p: Parameter, sharded: jax.Array) -> None:
    """No collective's result is the stack or more than one device's share of it; nothing else of that size exists."""
    inputs, outputs = groups.matrix_sides(p)
    layers, rows, columns = p.shape[0], math.prod(p.shape[d] for d in inputs), math.prod(p.shape[d] for d in outputs)
    replicas = math.prod(sharded.shape) // math.prod(sharded.sharding.shard_shape(sharded.shape))
    dealt = -(-layers // replicas) * rows * columns
    found = [(m["name"], elements(m["shapes"])) for m in COLLECTIVE.finditer(text)]
    assert {name for name, _ in found} <= {"all-to-all", "all-reduce"}, found
    assert any(name == "all-to-all" for name, _ in found)
    for name, size in found:
        assert size < layers * rows * columns
        assert size <= (dealt if name == "all-to-all" else layers * min(rows, columns) ** 2), (name, size)
    largest = max(elements(m[1]) for m in re.finditer(r"^\s*(?:ROOT )?\S+ = (f32\[[\d,]*\])", text, re.MULTILINE))
    assert largest < layers * rows * columns


def elements(shapes: str) -> int:
    """Float32 elements of an HLO result type, a tuple's parts added up."""
    return sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"f32\[([\d,]*)\]", shapes))


@pytest.mark.parametrize("shape", [(1, 64, 32), (1, 32, 64), (3, 64, 32)])
def test_a_stack_that_is_padded_compiles(shape):
    """The padding once reached XLA's all-to-all as an operand of another layout, and the program was refused."""
    x = draw(shape)
    names = ("layers", "mlp", "embed") if shape[1] > shape[2] else ("layers", "embed", "mlp")
    sizes = tuple(2 if axis == "fsdp" else 1 for axis in axes.AXES)
    with jax.set_mesh(jax.make_mesh(sizes, axes.AXES, devices=jax.devices()[:2])):
        done = jax.jit(lambda x: orthogonalise(x, (1, 1)))(jax.device_put(x, axes.sharding(names)))
        np.testing.assert_allclose(done, by_definition(x, (1, 1)), atol=1e-5)
