"""Microbatches: row r is in part r mod M; gradients add up in float32; parts without weight do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import axes
from jaxscale.mesh import mesh_sizes
from jaxscale.parallel.microbatches import split
from jaxscale.task import Parameter
from jaxscale.testing.hlo import collectives
from jaxscale.train.accumulate import loss_and_gradients


class Line:
    """loss = sum of weight * w over the tokens: every token has gradient 1."""

    @property
    def parameters(self):
        return {"w": Parameter((), ())}

    def loss(self, params, batch, key):  # noqa: ARG002 -- the signature of a task
        total = jnp.sum(batch["loss_weight"] * params["w"].astype(jnp.float32))
        return total, {"loss": total}


def test_many_small_parts_add_up_although_the_weights_are_bfloat16():
    """512 parts of 1/512 each: a sum in bfloat16 stands still at a half."""
    parts = 512
    with jax.set_mesh(jax.make_mesh((1,) * len(axes.AXES), axes.AXES, devices=jax.devices()[:1])):
        spec = axes.spec("act_batch", "act_sequence")
        batch = {"loss_weight": jnp.ones((parts, 1), jnp.float32, out_sharding=spec)}
        params = {"w": jnp.ones((), jnp.bfloat16)}
        _, gradients = jax.jit(lambda p, b: loss_and_gradients(Line(), p, b, jax.random.key(0), parts, False))(
            params, batch
        )
    assert gradients["w"] == 1


def noise_of(weights):
    """(parts that count, their mean squared gradient norm) of rows with these weights, a row in each part."""
    with jax.set_mesh(jax.make_mesh((1,) * len(axes.AXES), axes.AXES, devices=jax.devices()[:1])):
        spec = axes.spec("act_batch", "act_sequence")
        rows = jnp.asarray(weights, jnp.float32)[:, None]
        batch = {"loss_weight": jax.device_put(rows, jax.NamedSharding(jax.sharding.get_mesh(), spec))}
        step = jax.jit(lambda p, b: loss_and_gradients(Line(), p, b, jax.random.key(0), len(weights), True)[0])
        metrics = step({"w": jnp.float32(3)}, batch)
    return float(metrics["parts"]), float(metrics["part_square"])


def test_parts_without_weight_do_not_count_in_the_noise_scale():
    """Each part's mean gradient is 1, whatever its weight; a part without weight has none."""
    assert noise_of([1, 2, 3, 4]) == pytest.approx((4, 1))
    assert noise_of([1, 2, 0, 4]) == pytest.approx((3, 1))
    assert noise_of([0, 0, 0, 2]) == pytest.approx((1, 1))


class Company:
    """Its metric is the square of the sum of the row numbers of one call: it tells which rows came together."""

    @property
    def parameters(self):
        return {"w": Parameter((), ())}

    def loss(self, params, batch, key):  # noqa: ARG002 -- the signature of a task
        total = params["w"] * batch["loss_weight"].sum()
        return total, {"loss": total, "together": batch["row"].astype(jnp.float32).sum() ** 2}


def mesh_of(sizes):
    count = int(np.prod(list(sizes.values()), dtype=int))
    return jax.make_mesh(tuple(sizes.get(a, 1) for a in axes.AXES), axes.AXES, devices=jax.devices()[:count])


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_row_r_is_in_part_r_mod_m_and_stays_on_its_device(sizes):
    rows, parts, mesh = 32, 4, mesh_of(sizes)
    number = np.arange(rows, dtype=np.uint32)
    with jax.set_mesh(mesh):
        row = jax.device_put(number, axes.sharding(("act_batch",)))
        tokens = jax.device_put(np.tile(number[:, None], (1, 2)), axes.sharding(("act_batch", "act_sequence")))
        program = jax.jit(lambda row, tokens: tuple(split({"row": row, "tokens": tokens}, parts).values()))
        of_row, of_tokens = program(row, tokens)
        assert collectives(program.lower(row, tokens).compile().as_text(), mesh_sizes(mesh)) == {}
        batch = {"row": row, "loss_weight": tokens.astype(jnp.float32) * 0 + 1}
        step = jax.jit(lambda w, b: loss_and_gradients(Company(), {"w": w}, b, jax.random.key(0), parts, False)[0])
        together = float(step(jnp.float32(1), batch)["together"]) * batch["loss_weight"].size
    for part in range(parts):
        np.testing.assert_array_equal(np.asarray(of_row)[part], number[number % parts == part])
        np.testing.assert_array_equal(np.asarray(of_tokens)[part, :, 0], number[number % parts == part])
    assert together == pytest.approx(sum(float(number[number % parts == part].sum()) ** 2 for part in range(parts)))
