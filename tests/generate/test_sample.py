"""Which tokens may be drawn, and that a draw depends on seed, row and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate_samples import MESHES, mesh_of

from jaxscale.generate.sample import GenerateError, Sampling, allowed, sample

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [1, 3, 4]),
        (5, 1.0, [0, 1, 2, 3, 4]),
        (99, 1.0, [0, 1, 2, 3, 4]),
        (0, 1e-6, [1]),
        (0, 0.39, [1]),
        (0, 0.41, [1, 3]),
        (0, 0.66, [1, 3, 4]),
        (0, 0.96, [0, 1, 2, 3, 4]),
        (2, 0.6, [1]),  # 0.4 / (0.4 + 0.25) = 0.615 is enough: probabilities are those among the top k
        (2, 0.62, [1, 3]),
        (3, 0.8, [1, 3, 4]),
    ],
)
def test_top_k_and_top_p_keep_exactly_these(top_k, top_p, expected):
    assert np.flatnonzero(np.asarray(allowed(LOGITS, top_k, top_p))).tolist() == expected


def test_of_equal_tokens_the_lower_ids_stay():
    equal = np.zeros(6, np.float32)
    assert np.flatnonzero(np.asarray(allowed(equal, 2, 1.0))).tolist() == [0, 1]
    assert np.flatnonzero(np.asarray(allowed(equal, 0, 0.45))).tolist() == [0, 1, 2]


def draw(logits, positions, rows=None, seed=0, mesh="one", **settings):
    rows = np.zeros(len(positions), np.int32) if rows is None else rows
    logits = np.broadcast_to(logits, (len(positions), len(logits)))
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        settings = Sampling(**{"vocabulary": logits.shape[1], **settings})
        drawn = jax.jit(lambda *a: sample(settings, *a))(
            jax.reshard(jnp.asarray(logits), jax.P(("data", "fsdp", "expert"), None)),
            np.uint32(seed),
            rows,
            np.asarray(positions, np.int32),
        )
        return np.asarray(drawn).tolist()


MANY = np.arange(512)


def test_every_allowed_token_is_drawn_and_no_other():
    assert set(draw(LOGITS, MANY)) == {0, 1, 2, 3, 4}
    assert set(draw(LOGITS, MANY, top_k=2)) == {1, 3}
    assert set(draw(LOGITS, MANY, top_p=0.66)) == {1, 3, 4}
    assert set(draw(LOGITS, MANY, vocabulary=3)) == {0, 1, 2}
    assert set(draw(LOGITS, MANY, vocabulary=3, top_k=2)) == {1, 2}


def test_temperature():
    assert set(draw(LOGITS, MANY, temperature=0)) == set(draw(LOGITS, MANY, temperature=1e-3)) == {1}
    assert set(draw(LOGITS, MANY, temperature=0, vocabulary=1)) == {0}
    count = {t: draw(LOGITS, MANY, temperature=t).count(1) for t in (0.5, 1.0, 5.0)}
    assert count[0.5] > count[1.0] > count[5.0]


def test_a_draw_depends_on_seed_row_and_position():
    logits = np.zeros(64, np.float32)
    base = draw(logits, MANY[:64])
    assert base == draw(logits, MANY[:64])
    assert base != draw(logits, MANY[:64], seed=1)
    assert base != draw(logits, MANY[:64] + 64)
    assert base != draw(logits, MANY[:64], rows=np.ones(64, np.int32))
    assert base[::-1] == draw(logits, MANY[:64][::-1])


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_any_mesh_draws_the_same(mesh):
    rows = np.arange(64, dtype=np.int32)
    logits = np.sin(np.arange(50, dtype=np.float32))
    settings = {"top_k": 20, "top_p": 0.9, "seed": 3, "rows": rows}
    assert draw(logits, rows + 7, mesh=mesh, **settings) == draw(logits, rows + 7, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
    ],
)
def test_settings_that_cannot_work(settings, said):
    with pytest.raises(GenerateError, match=said):
        Sampling(vocabulary=4, **settings)
