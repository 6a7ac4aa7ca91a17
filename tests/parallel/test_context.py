"""Context parallelism: balance as a count of pairs, the order of positions, what is refused, and training runs."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import axes, rng
from jaxscale.audit import AuditError, audit
from jaxscale.cli import main
from jaxscale.config import Config, DataConfig, PhaseConfig
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.parallel import context

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "parity"))
from parity_run import mesh_of, parity_config  # noqa: E402 - beside the parity tests
from parity_run import parity_run as run  # noqa: E402

# Balance


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("form", context.BALANCED)
def test_every_pair_is_computed_once_and_all_devices_compute_equally_many(form, size):
    pairs = context.computed_pairs(form, size, context.reach(0, 1, size))
    assert {len(mine) for mine in pairs} == {2 * size + 1}
    everything = [pair for mine in pairs for pair in mine]
    assert sorted(everything) == [(q, k) for q in range(2 * size) for k in range(q + 1)]
    for device, mine in enumerate(pairs):  # and a device has only its own queries
        assert {q for q, _ in mine} == {device, 2 * size - 1 - device}


@pytest.mark.parametrize("window", [1, 2, 16, 17, 18, 40, 100, 1000])
@pytest.mark.parametrize("form", context.BALANCED)
def test_a_window_leaves_only_pairs_it_does_not_empty(form, window):
    size, chunk = 8, 16
    reach = context.reach(window, chunk, size)
    position = np.arange(2 * size * chunk)
    seen = (position[:, None] >= position) & (position[:, None] - position < window)
    blocks = seen.reshape(2 * size, chunk, 2 * size, chunk).any((1, 3))
    pairs = context.computed_pairs(form, size, reach)
    assert sorted(pair for mine in pairs for pair in mine) == [tuple(pair) for pair in np.argwhere(blocks)]
    counts = [len(mine) for mine in pairs]
    assert max(counts) - min(counts) <= reach  # what the beginning of a row lacks
    if window <= chunk + 1:
        assert max(counts) - min(counts) <= 1


def test_with_a_short_window_keys_visit_neighbours_only():
    assert context.ring_runs(8, 15) == ((1, 7),)
    assert context.ring_runs(8, 1) == ((1, 1), (7, 1))
    assert context.ring_runs(8, 0) == ()


# Order


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_rows_are_arranged_and_restored(size):
    length = 4 * size
    mesh, spec = mesh_of({"context": size}), P(axes.BATCH_AXES, "context")
    row = np.arange(2 * length, dtype=np.int32).reshape(2, length)
    with jax.set_mesh(mesh):
        placed = jax.device_put(row, NamedSharding(mesh, spec))
        both = jax.jit(context.arrange)({"a": placed, "b": placed.astype(np.float32)})
        for found in both.values():
            np.testing.assert_array_equal(found, row[:, context.order(length, size)])
            assert found.sharding.spec == spec
        back = jax.jit(context.restore)(both["b"][:, :, None])
    np.testing.assert_array_equal(back[:, :, 0], row)


def test_dropout_falls_on_the_same_positions():
    order = context.order(16, 4)
    with jax.set_mesh(mesh_of({"fsdp": 2, "context": 4})):
        x = jnp.ones((2, 16, 4), out_sharding=axes.spec("act_batch", "act_residual_sequence", None))
        rows = jax.reshard(jnp.arange(2), axes.spec("act_batch"))
        drops = [jax.jit(partial(rng.dropout, rate=0.5, key=jax.random.key(3), order=o)) for o in (None, order)]
        own, balanced = (np.asarray(drop(x, row_B=rows)) for drop in drops)
    assert 0.3 < (own == 0).mean() < 0.7
    np.testing.assert_array_equal(balanced, own[:, order])


# Choice


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "size", "tensor", "chosen"),
    [
        (32, 8, 1024, 8, 1, "ulysses"),  # a key head for each device
        (32, 8, 1024, 4, 2, "ulysses"),
        (32, 8, 1024, 8, 2, "ring"),  # 4 key heads of a device on 8 devices: copies would be needed
        (32, 8, 1000, 16, 1, "ulysses"),  # no ring: 32 chunks do not divide 1000
        (6, 6, 1024, 4, 1, "ring"),
    ],
)
def test_auto(heads, kv_heads, length, size, tensor, chosen):
    sizes = {"context": size, "tensor": tensor}
    assert context.choose("auto", sizes, length=length, heads=heads, kv_heads=kv_heads) == chosen


def findings(form, sizes, heads=8, kv_heads=4, **data):
    config = Config(
        "test",
        TransformerConfig(width=64, heads=heads, kv_heads=kv_heads, head_dim=16, context=form),
        data=DataConfig(**{"sequence": 256, "batch": 8} | data),
        phases=(PhaseConfig(5, sequence=1024),),
    )
    with jax.set_mesh(mesh_of({})):
        table = config.model.task(config).parameters
    with pytest.raises(AuditError) as error:
        audit(table, dict.fromkeys(axes.AXES, 1) | sizes, config)
    return str(error.value)


def test_what_cannot_be_divided_is_refused_with_what_can():
    for form in context.BALANCED:
        said = findings(form, {"context": 4}, sequence=252)
        assert f"model.context is {form}, but {form} cuts a row into 2 x mesh.context (4) = 8 chunks" in said
        assert "use a sequence of 248 or 256, or model.context=ulysses (data.sequence)" in said
    said = findings("ulysses", {"context": 3, "fsdp": 2}, sequence=252)
    assert "the 8 query heads and 4 key/value heads of a device out over mesh.context (3)" in said
    assert "use mesh.context 1, 2, 4 or 8, or model.context=ring (data.sequence)" in said
    assert "(phase from step 5)" in said
    said = findings("auto", {"context": 4}, heads=6, kv_heads=3, sequence=252)
    assert "no form of context parallelism works: ring cuts" in said
    assert "; and ulysses deals" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.context", "ring", "--data.sequence", "252"], "use a sequence of 248 or 256"),
        (
            ["--model.context", "gather", "--model.attention", "cudnn"],
            "use model.context=ulysses, or model.attention=au",
        ),
    ],
)
def test_a_run_that_cannot_work_leaves_no_trace(tmp_path, capsys, flags, message):
    recipe = str(ROOT / "recipes" / "lm_nano.py")
    flags = [recipe, "--devices", "8", "--mesh.context", "4", "--run.dir", str(tmp_path / "run"), *flags]
    assert main(["train", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


# Bytes


def test_bytes_of_a_layer():
    """By hand: 10 tokens a device, 4 devices, heads of 8 in bfloat16; 4 query heads, 2 key heads."""
    given = {"tokens": 10, "heads": 4, "kv_heads": 2, "head_dim": 8, "context": 4, "element": 2}
    keys, queries = 2 * 10 * 2 * 8, 10 * 4 * 8
    assert context.bytes_per_layer("gather", **given) == (3 * keys * 2, 3 * keys * 2 + 3 * keys * 4)
    assert context.bytes_per_layer("ring", **given) == (3 * keys * 2, 3 * keys * 2 + 4 * keys * 4)
    moved = (2 * queries + 2 * keys) * 2 * 3 / 4  # the 2 key heads are copied for 4 devices
    assert context.bytes_per_layer("ulysses", **given) == (moved, moved)


# Training


def same(form, sizes, **changes):
    """Gradients of step 1 and losses of 5 steps beside one device, as the parity tests want them."""
    variant = changes.get("variant", "lm_parity")
    if variant not in _one_device:
        _one_device[variant] = run(parity_config(variant=variant), {})
    right, config = _one_device[variant], parity_config(**changes)
    found = run(dataclasses.replace(config, model=dataclasses.replace(config.model, context=form)), sizes)
    for path in (path for path in right if path.startswith("grad/")):
        assert np.linalg.norm(found[path] - right[path]) <= 1e-5 * np.linalg.norm(right[path]), path
    np.testing.assert_allclose(found["losses"], right["losses"], rtol=1e-6)


_one_device: dict[str, dict[str, np.ndarray]] = {}


@pytest.mark.parametrize(
    ("form", "sizes", "changes"),
    [
        ("ring", {"context": 4, "fsdp": 2}, {"remat": "names"}),
        pytest.param("ring", {"context": 2}, {}, marks=pytest.mark.slow),
        pytest.param(
            "gather", {"context": 2, "tensor": 2}, {"remat": "full", "microbatches": 4}, marks=pytest.mark.slow
        ),
        pytest.param("gather", {"context": 4}, {}, marks=pytest.mark.slow),
        ("ulysses", {"context": 4}, {}),
        pytest.param("ulysses", {"context": 2, "data": 2, "expert": 2}, {}, marks=pytest.mark.slow),
        *(
            pytest.param(form, {"context": 4}, {"variant": "everything"}, marks=pytest.mark.slow)
            for form in ("ring", "gather", "ulysses")
        ),
        *(
            pytest.param(form, {"stage": 2, "context": 2}, {"microbatches": 4}, marks=pytest.mark.slow)
            for form in ("ring", "gather", "ulysses")
        ),
    ],
    ids=str,
)
def test_parity(form, sizes, changes):
    same(form, sizes, **changes)
