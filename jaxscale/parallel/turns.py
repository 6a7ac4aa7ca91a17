"""The order in which the devices of a pipeline stage do the conditional parts of a tick. Read next: `pipeline.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


class Turns:
    """Conditionals that take their turns, in the same order on all devices.

    Devices of a stage meet in the collectives inside. XLA's CPU backend runs what does not depend on one another in any
    order, with fewer threads than collectives may wait at once: two devices that begin with different ones stand for
    ever. So each conditional is made to depend on the one before by a number that only the program's run knows.
    """

    def __init__(self) -> None:
        self._before = jnp.int32(0)

    def take[Value](self, wanted: jax.Array, work: Callable[[], Value], otherwise: Callable[[], Value]) -> Value:
        """`work()` where it is wanted, else `otherwise()`."""
        return self.switch(wanted.astype(jnp.int32), [otherwise, work])

    def switch[Value](self, index: jax.Array, branches: Sequence[Callable[[], Value]]) -> Value:
        """`branches[index]()`. index: int32, not negative."""
        # Never more than it is: what came before is not negative, and no compiler can know.
        index = jnp.minimum(index, index + self._before)
        chosen = [lambda branch=branch, mark=mark: (branch(), jnp.int32(mark)) for mark, branch in enumerate(branches)]
        found: tuple[Value, jax.Array] = jax.lax.switch(index, chosen)
        value, self._before = found
        return value

    def last(self, value: jax.Array) -> jax.Array:
        """The value, once all turns are over."""
        return jnp.where(self._before < 0, jnp.zeros_like(value), value)
