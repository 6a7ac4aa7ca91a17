"""Microbatches: gradients of bfloat16 weights are added up in float32, and parts without weight do not count."""

import jax
import jax.numpy as jnp
import pytest

from jaxscale import axes
from jaxscale.train.accumulate import loss_and_gradients


class Line:
    """loss = sum of weight * w over the tokens: every token has gradient 1."""

    @property
    def parameters(self):
        return {"w": None}

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
