"""The vocabulary's weights at their use: shared out in groups of `fsdp` devices, so that none of them is ever whole.

A layer's weights are gathered over `fsdp` before their use. For the embedding and the head that is wasteful: their
gathered copies and their float32 gradients are by far the largest arrays of a step (Llama 3.1 8B: 1 and 2 GiB each on
every device). Here `count` devices of `fsdp` form a group. Each brings its tokens to the others and works on its part
of the weight with the tokens of all; results go back. Only between the groups is the weight gathered. With one device
to a group this is FSDP, with all of `fsdp` in one the weight is not gathered at all.

Device i of `fsdp` is member i // between of its group, and in group i % between: the columns that the members of one
part store are neighbours. Read next: `embed.py` and `ops/cross_entropy.py`, which use it inside their manual regions.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from jaxscale.divisors import divisors

AXIS = "fsdp"
LEAST_COLUMNS = 128
"""Columns of the embedding that a device looks up at least: a TPU's vector registers are as wide."""


@dataclass(frozen=True)
class Groups:
    """`fsdp` devices as `between` groups of `count` members. Methods run inside a region that is manual over `fsdp`."""

    count: int
    fsdp: int

    @property
    def between(self) -> int:
        """How many groups."""
        return self.fsdp // self.count

    def member(self) -> jax.Array | int:
        """Which member of its group this device is."""
        return jax.lax.axis_index(AXIS) // self.between if self.count > 1 else 0

    def all_gather(self, x: jax.Array) -> jax.Array:
        """(...) -> (count, ...): what every member has."""
        if self.count == 1:
            return x[None]
        return jax.lax.all_gather(x, AXIS, axis_index_groups=self._inside)

    def reduce_scatter(self, x: jax.Array) -> jax.Array:
        """(count, ...) -> (...): the members' sum of this member's part."""
        if self.count == 1:
            return x[0]
        return jax.lax.psum_scatter(x, AXIS, axis_index_groups=self._inside)

    def all_to_all(self, x: jax.Array) -> jax.Array:
        """(count, ...) -> (count, ...): part m goes to member m, and part m of the result comes from it."""
        return x if self.count == 1 else jax.lax.all_to_all(x, AXIS, 0, 0, axis_index_groups=self._inside)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the members."""
        return x if self.count == 1 else jax.lax.psum(x, AXIS, axis_index_groups=self._inside)

    def largest(self, x: jax.Array) -> jax.Array:
        """The maximum over the members."""
        return x if self.count == 1 else jax.lax.pmax(x, AXIS, axis_index_groups=self._inside)

    def gather_between(self, x: jax.Array, dim: int) -> jax.Array:
        """Joins, along `dim`, what the devices of the same part have, in their order."""
        if self.between == 1:
            return x
        return jax.lax.all_gather(x, AXIS, axis=dim, tiled=True, axis_index_groups=self._across)

    def scatter_between(self, x: jax.Array, dim: int) -> jax.Array:
        """The sum over the devices of the same part, of which each keeps its piece of `dim`."""
        if self.between == 1:
            return x
        return jax.lax.psum_scatter(x, AXIS, scatter_dimension=dim, tiled=True, axis_index_groups=self._across)

    @property
    def _inside(self) -> list[list[int]] | None:
        """The members of each group; None: all devices of the axis are in one, which compilers know best."""
        if self.between == 1:
            return None
        return [[m * self.between + group for m in range(self.count)] for group in range(self.between)]

    @property
    def _across(self) -> list[list[int]] | None:
        """The devices that have the same part, one of each group."""
        if self.count == 1:
            return None
        return [[m * self.between + group for group in range(self.between)] for m in range(self.count)]


def head_groups(tokens: int, vocabulary: int, fsdp: int, most: int = 0) -> Groups:
    """The groups with which the head's loss moves the fewest bytes. Pure.

    tokens: of one device; vocabulary: rows of the head on one device when gathered (its `tensor` shard). A member sends
    its tokens' hidden states out and gets their gradients back, in bfloat16: 4 bytes per token, column and other
    member. Its part of the head is gathered in bfloat16 and its gradient scattered in float32: 6 bytes per row and
    column. Sizes that do not divide the vocabulary are passed over. most: members of a group at most; 0 = any number.
    """
    sizes = [n for n in divisors(fsdp) if vocabulary % n == 0 and (not most or n <= most)]

    def cost(count: int) -> float:
        return 4 * tokens * (count - 1) + 6 * vocabulary / count * (1 - count / fsdp)

    return Groups(min(sizes, key=cost), fsdp)


def embedding_groups(width: int, fsdp: int) -> Groups:
    """The groups of the embedding: as large as leaves each member LEAST_COLUMNS of the `width` columns. Pure.

    Tokens are 4 bytes to send, and each vector that is found goes to one device: what a lookup moves hardly depends on
    the size of the groups, what the table's gathering moves shrinks with it.
    """
    return Groups(max(n for n in divisors(fsdp) if n == 1 or width // n >= LEAST_COLUMNS), fsdp)
