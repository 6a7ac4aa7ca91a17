"""How `fsdp` devices share the vocabulary: the choice, and the embedding's lookup with each size of group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes
from jaxscale.layers import vocabulary_groups
from jaxscale.layers.embed import embed
from jaxscale.layers.vocabulary_groups import Groups, embedding_groups, head_groups
from jaxscale.precision import Precision

SINGLE = Precision(jnp.float32, jnp.float32, jnp.float32)
B, S, D, V = 8, 16, 16, 24


def test_the_head_is_shared_as_moves_the_fewest_bytes():
    def moved(count, tokens, vocabulary, fsdp):
        """Elements times bytes through one device: hidden states and their gradients; the head and its gradient."""
        return tokens * (count - 1) * (2 + 2) + (vocabulary // count - vocabulary // fsdp) * (2 + 4)

    for tokens, vocabulary, fsdp in ((8192, 128256, 16), (8192, 128256, 64), (64, 128256, 32), (1 << 20, 512, 8)):
        found = head_groups(tokens, vocabulary, fsdp)
        counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if fsdp % count == 0 and vocabulary % count == 0]
        assert found.count == min(counts, key=lambda n: moved(n, tokens, vocabulary, fsdp))
        assert found.count * found.between == fsdp


def test_a_vocabulary_that_cannot_be_shared_is_gathered():
    assert head_groups(tokens=8192, vocabulary=50257, fsdp=16).count == 1  # 29 x 1733
    assert head_groups(tokens=8, vocabulary=128256, fsdp=16, most=4).count == 4
    assert head_groups(tokens=8, vocabulary=128256, fsdp=1).count == 1


def test_the_embedding_keeps_whole_vector_registers():
    assert embedding_groups(4096, 16).count == 16
    assert embedding_groups(4096, 256) == Groups(count=32, fsdp=256)
    assert embedding_groups(256, 8).count == 2
    assert embedding_groups(64, 8).count == 1


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(tuple(sizes.get(a, 1) for a in axes.AXES), axes.AXES, devices=jax.devices()[:count])


@pytest.mark.parametrize("members", [1, 2, 4])
@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_lookup_and_gradient(sizes, members, monkeypatch):
    monkeypatch.setattr(vocabulary_groups, "LEAST_COLUMNS", D // members)
    assert embedding_groups(D, 4).count == members
    rng = np.random.default_rng(1)
    table, tokens = rng.normal(size=(V, D)).astype(np.float32), rng.integers(0, V, (B, S)).astype(np.int32)
    weight = rng.normal(size=(B, S, D)).astype(np.float32)
    with jax.set_mesh(mesh_of(sizes)):
        put = lambda x, *names: jax.device_put(x, axes.sharding(names))  # noqa: E731 - one-line helper
        on_devices = put(table, "vocab", "embed")
        placed = put(tokens, "act_batch", "act_sequence")
        x, transpose = jax.vjp(jax.jit(lambda t: embed(SINGLE, t, placed)), on_devices)
        np.testing.assert_array_equal(x, table[tokens])
        (gradient,) = transpose(put(weight, "act_batch", "act_residual_sequence", "act_embed"))
        expected = np.zeros((V, D))
        np.add.at(expected, tokens, weight.astype(np.float64))
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
        assert gradient.sharding.is_equivalent_to(on_devices.sharding, 2)
