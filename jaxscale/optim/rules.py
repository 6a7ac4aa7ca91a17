"""Update rules for one parameter: from gradient and state to the direction that the learning rate multiplies.

Rules are pure and elementwise (Adafactor adds means over dims), so each result is sharded like its parameter and no
rule names a mesh axis. They are written out instead of taken from optax, since optax keeps NamedTuple states with step
counters of their own (here the state is one nested dict and the step an argument), factors Adafactor over whatever two
dims of a stack are largest, and costs 0.7 s of start-up; the tests compare them with optax. Read next: `build.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

Slots = dict[str, jax.Array]
"""State of one parameter by name, float32: {"mu": ..., "nu": ...}."""


class Rule(Protocol):
    """How one parameter is updated."""

    def init(self, weights: jax.Array) -> Slots:
        """State before the first step, sharded like the weights."""
        ...

    def direction(self, gradient: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        """What to subtract, before learning rate and decay, and the new state. `gradient`: float32; `step`: 0-based."""
        ...


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction (Kingma and Ba 2015, algorithm 1); with decoupled decay it is AdamW."""

    b1: float
    b2: float
    epsilon: float

    def init(self, weights: jax.Array) -> Slots:
        # Two arrays, not one twice: a buffer can be donated to the step only once.
        return {slot: jnp.zeros_like(weights, dtype=jnp.float32) for slot in ("mu", "nu")}

    def direction(self, gradient: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        mu = self.b1 * slots["mu"] + (1 - self.b1) * gradient
        nu = self.b2 * slots["nu"] + (1 - self.b2) * jnp.square(gradient)
        updates_done = step + 1
        unbiased_mu = mu / (1 - self.b1**updates_done)
        unbiased_nu = nu / (1 - self.b2**updates_done)
        return unbiased_mu / (jnp.sqrt(unbiased_nu) + self.epsilon), {"mu": mu, "nu": nu}


@dataclass(frozen=True)
class Sign:
    """The sign of the gradient, without state: for what is steered by a step of its own (`Parameter.sign_step`)."""

    def init(self, weights: jax.Array) -> Slots:
        del weights
        return {}

    def direction(self, gradient: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        del slots, step
        return jnp.sign(gradient), {}


@dataclass(frozen=True)
class Momentum:
    """SGD with heavy-ball momentum (Sutskever et al. 2013); momentum 0 is plain SGD and has no state."""

    momentum: float

    def init(self, weights: jax.Array) -> Slots:
        return {"momentum": jnp.zeros_like(weights, dtype=jnp.float32)} if self.momentum else {}

    def direction(self, gradient: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        del step
        if not self.momentum:
            return gradient, {}
        momentum = self.momentum * slots["momentum"] + gradient
        return momentum, {"momentum": momentum}


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer and Stern 2018, algorithms 4 and 5) without momentum and without relative step sizes.

    A weight's second moment is the outer product of a mean per input and a mean per output: memory of the sides instead
    of their product. Steps are not scaled by the weights' size (as in Zhai et al. 2022), so that learning rates and
    decay mean what they mean for AdamW. Every layer of a stack is a weight of its own, with its own factors and its own
    clipping; norms and biases keep their full second moment.

    `stack`: number of leading dims that enumerate weights; `sides`: positions of the input and of the output dims, None
    where nothing is factored.
    """

    stack: int
    sides: tuple[tuple[int, ...], tuple[int, ...]] | None
    exponent: float = 0.8
    """The second moment's decay at update t is 1 - t^-exponent (section 7.2)."""
    epsilon: float = 1e-30
    threshold: float = 1.0
    """Root mean square above which a weight's update is scaled down (section 6)."""

    def init(self, weights: jax.Array) -> Slots:
        # Reducing zeros, not naming shapes: the factors get the sharding that their later means will have.
        zeros = jnp.zeros_like(weights, dtype=jnp.float32)
        if self.sides is None:
            return {"second_moment": zeros}
        inputs, outputs = self.sides
        return {"inputs": jnp.mean(zeros, axis=outputs), "outputs": jnp.mean(zeros, axis=inputs)}

    def direction(self, gradient: jax.Array, slots: Slots, step: jax.Array) -> tuple[jax.Array, Slots]:
        new = (step + 1).astype(jnp.float32) ** -self.exponent
        square = jnp.square(gradient) + self.epsilon
        if self.sides is None:
            slots = {"second_moment": (1 - new) * slots["second_moment"] + new * square}
            update = gradient * jax.lax.rsqrt(slots["second_moment"])
        else:
            inputs, outputs = self.sides
            slots = {
                "inputs": (1 - new) * slots["inputs"] + new * jnp.mean(square, axis=outputs),
                "outputs": (1 - new) * slots["outputs"] + new * jnp.mean(square, axis=inputs),
            }
            # Dims of `inputs` slots are the stack's and then the input dims, at the same positions as in the weight.
            rows = slots["inputs"] / jnp.mean(slots["inputs"], axis=inputs, keepdims=True)
            update = gradient * jnp.expand_dims(jax.lax.rsqrt(rows), outputs)
            update = update * jnp.expand_dims(jax.lax.rsqrt(slots["outputs"]), inputs)
        own = tuple(range(self.stack, gradient.ndim))
        size = jnp.sqrt(jnp.mean(jnp.square(update), axis=own, keepdims=True))
        return update / jnp.maximum(1.0, size / self.threshold), slots
