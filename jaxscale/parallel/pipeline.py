"""The pipeline runtime: executes any schedule table, with every other parallelism inside a stage.

One program for all stages: a scan over the ticks of the table, manual over the mesh axis `stage` alone. In a tick a
stage does what its row says (a forward, a backward, a weights' half, or nothing), then activations go one stage on and
gradients one stage back. A backward computes its chunk's forward again from the chunk's input, which is all that is
kept, in a slot that the table assigned (`buffers.py`). The first chunk begins with the embedding, the last one ends
with the head, each only there, so that no other stage pays for them. Where chunks have different numbers of layers
(`division.py`), there is a branch for each number: a shorter chunk reads its own layers and never its padding.

Legend: M microbatches, B rows of a microbatch, S sequence, D width. Read next: `schedules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale.parallel.buffers import gradient_slots, input_slots
from jaxscale.parallel.costs import OpCosts, make_table
from jaxscale.parallel.rows import Row, rows
from jaxscale.parallel.schedules import Kind, Table, forward_only
from jaxscale.parallel.turns import Turns
from jaxscale.task import PER_LAYER, Batch, LayeredTask, Params

STAGE = "stage"
LAYERS = "layers"
"""The entry of the parameters whose leaves are stacked over layers: (layers of this stage, ...) inside a stage."""
Sums = dict[str, jax.Array]
_Pulled = tuple[jax.Array, jax.Array, Params, Params, Sums]
"""Gradients of a chunk's input and output, and the sums of those of layers, of shared weights, and of metrics."""


def stages() -> int:
    """Of the current mesh; 1 = no pipeline."""
    return int(jax.sharding.get_abstract_mesh().shape.get(STAGE, 1))


def loss_and_gradients(
    task: LayeredTask, params: Params, parts: Batch, key: jax.Array | None, weight: jax.Array
) -> tuple[Sums, Params]:
    """Metric sums over all microbatches divided by `weight`, and the gradients of the loss sum divided by it.

    parts: (M, B, ...), B sharded over (data, fsdp, expert). weight: float32, of the whole batch. Gradients are float32,
    sharded as the parameters.
    """
    parts = task.arrange(parts)
    costs = OpCosts(shares=task.division.shares)
    table = make_table(task.pipeline.schedule, stages(), parts["tokens"].shape[0], task.pipeline.chunks, costs)
    sums, layers, shared = _on_stages(_train, task, table, key, params, parts, weight)
    return {name: value / weight for name, value in sums.items()}, {**shared, LAYERS: layers}


def forward_loss(task: LayeredTask, params: Params, parts: Batch, key: jax.Array | None) -> tuple[jax.Array, Sums]:
    """Weighted sums of the loss to differentiate and of the metrics, forward only. Not differentiable.

    parts: arranged already.
    """
    table = forward_only(stages(), parts["tokens"].shape[0], task.pipeline.chunks)
    (total, sums), _, _ = _on_stages(_evaluate, task, table, key, params, parts, jnp.float32(1))
    return total, sums


def _on_stages(
    body: Callable[[_Stage, jax.Array], Any],
    task: LayeredTask,
    table: Table,
    key: jax.Array | None,
    params: Params,
    parts: Batch,
    weight: jax.Array,
) -> Any:
    """Runs `body` on each stage with that stage's layers: (a sum over stages, what is the stage's own, another sum)."""

    def run(layers: Params, shared: Params, parts: Batch, weight: jax.Array) -> Any:
        return body(_Stage(task, table, key, layers, shared, parts), weight)

    region = jax.shard_map(
        run,
        in_specs=(P(STAGE), P(), P(), P()),
        out_specs=(P(), P(STAGE), P()),
        axis_names={STAGE},
        check_vma=False,  # parameters that all stages share vary nowhere, their gradients do until they are summed
    )
    shared = {name: value for name, value in params.items() if name != LAYERS}
    return region(params[LAYERS], shared, dict(parts), weight)


class _Stage:
    """One stage's share of the work, while it is traced: its layers, what all stages share, and the microbatches."""

    def __init__(
        self, task: LayeredTask, table: Table, key: jax.Array | None, layers: Params, shared: Params, parts: Batch
    ) -> None:
        self.task, self.table, self.key, self.shared, self.parts = task, table, key, shared, parts
        self.index = jax.lax.axis_index(STAGE)
        self.division = task.division
        self.sizes = sorted(set(self.division.sizes))
        """Numbers of layers that chunks have."""
        self.layers = layers
        self.stream = jax.eval_shape(lambda: task.begin(shared, self.part(0)))
        self.none = jnp.zeros(self.stream.shape, self.stream.dtype, out_sharding=_spec(self.stream))

    def part(self, microbatch: jax.Array | int) -> Batch:
        """One microbatch."""
        return {
            name: jax.lax.dynamic_index_in_dim(value, microbatch, 0, keepdims=False)
            for name, value in self.parts.items()
        }

    def chunk_of(self, own: jax.Array) -> jax.Array:
        """Chunk of the model: the stage's own chunk c is chunk c * stages + stage."""
        return own * self.table.stages + self.index

    def by_size(self, own: jax.Array, wanted: jax.Array, sizes: Sequence[int]) -> jax.Array:
        """Which branch a chunk takes: 0 where it is not wanted, else 1 + the place of its number of layers in `sizes`.

        sizes: those of all chunks that are ever wanted.
        """
        if len(sizes) == 1:
            return wanted.astype(jnp.int32)
        places = jnp.array([sizes.index(size) if size in sizes else 0 for size in self.division.sizes])
        return jnp.where(wanted, 1 + places[jnp.maximum(self.chunk_of(own), 0)], 0)

    def weights(self, own: jax.Array, size: int) -> Params:
        """Of one of the stage's own chunks, which has `size` layers."""
        if self.table.chunks == 1 and size == self.division.longest:
            return self.layers
        begin = own * self.division.longest
        return jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, begin, size), self.layers)

    def add(self, total: Params, own: jax.Array, gradients: Params) -> Params:
        """Adds gradients of one of the stage's own chunks; those of padding stay zero."""
        size = jax.tree.leaves(gradients)[0].shape[0]
        if self.table.chunks == 1 and size == self.division.longest:
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients)

        def into(t: jax.Array, g: jax.Array) -> jax.Array:
            begin = own * self.division.longest
            before = jax.lax.dynamic_slice_in_dim(t, begin, size)
            return jax.lax.dynamic_update_slice_in_dim(t, before + g.astype(t.dtype), begin, 0)

        return jax.tree.map(into, total, gradients)

    def input(self, turns: Turns, own: jax.Array, part: Batch, kept: jax.Array, slot: jax.Array) -> jax.Array:
        """The input of a chunk: made from the tokens for the first one, else what lies in its slot. (B, S, D)"""
        return turns.take(
            (own >= 0) & (self.chunk_of(own) == 0),
            lambda: self.task.begin(self.shared, part),
            lambda: _take(kept, slot),
        )

    def through(
        self, weights: Params, x_BSD: jax.Array, own: jax.Array, part: Batch
    ) -> tuple[tuple[jax.Array, jax.Array | None], Sums]:
        """A chunk's layers: what they give, what they add to the loss, and to metrics, (layers of the model, ...)."""
        first = jnp.array(self.division.starts)[jnp.maximum(self.chunk_of(own), 0)]
        y_BSD, added = self.task.through(weights, x_BSD, part, self.key, first)
        return (y_BSD, added.loss), {name: self._placed(name, value, first) for name, value in added.metrics.items()}

    def _placed(self, name: str, value: jax.Array, first: jax.Array) -> jax.Array:
        """Metrics of a chunk's layers among those of all layers, in the model's order."""
        if not name.startswith(PER_LAYER):
            return value
        every = jnp.zeros((self.division.layers, *value.shape[1:]), value.dtype)
        return jax.lax.dynamic_update_slice_in_dim(every, value, first, 0)

    def no_sums(self) -> tuple[jax.Array, Sums]:
        """Zeros of what all layers and the end give: the loss and the metrics."""
        own, part = jnp.int32(0), self.part(0)
        some = self.weights(own, self.sizes[0])
        (_, added), of_layers = jax.eval_shape(lambda: self.through(some, self.none, own, part))
        loss, of_end = jax.eval_shape(lambda: self.task.end(self.shared, self.none, part))
        del added  # a part of the loss
        return jax.tree.map(lambda value: jnp.zeros(value.shape, value.dtype), (loss, {**of_layers, **of_end}))

    def is_last(self, own: jax.Array) -> jax.Array:
        return self.chunk_of(own) == self.table.depth - 1


class _Carry(NamedTuple):
    """What a stage has between two ticks."""

    inputs: jax.Array
    """(slots + 1, B, S, D): inputs of chunks; the last slot takes what nobody needs."""
    gradients: jax.Array
    sent: jax.Array
    """(B, S, D), from the stage before."""
    sent_back: jax.Array
    layers: Params
    """Gradients, float32."""
    shared: Params
    sums: Sums


def _train(stage: _Stage, weight: jax.Array) -> tuple[Sums, Params, Params]:
    task, table, shared = stage.task, stage.table, stage.shared
    kinds = {op.kind for op in table.when()}
    inner = sorted(set(stage.division.sizes[:-1]))  # the last chunk has a branch of its own

    def end(shared: Params, y_BSD: jax.Array, part: Batch) -> tuple[jax.Array, Sums]:
        total, sums = task.end(shared, y_BSD, part)
        return total / weight, sums

    def forward(turns: Turns, carry: _Carry, row: Row) -> jax.Array:
        own, part = row.forward, stage.part(row.forward_microbatch)
        x_BSD = stage.input(turns, own, part, carry.inputs, row.forward_input)
        # The last chunk's output is computed with its gradient, and nobody wants it before.
        which = stage.by_size(own, (own >= 0) & ~stage.is_last(own), inner)

        def through(size: int) -> jax.Array:
            return stage.through(stage.weights(own, size), x_BSD, own, part)[0][0]

        branches: list[Callable[[], jax.Array]] = [lambda: stage.none, *(partial(through, size) for size in inner)]
        return turns.switch(which, branches)

    def pulled(y: tuple[jax.Array, jax.Array | None], dy_BSD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The gradients of what a chunk gives: its output's, and that of what it adds to the loss."""
        return dy_BSD, None if y[1] is None else 1 / weight

    def backward(turns: Turns, carry: _Carry, row: Row, kind: Kind) -> tuple[jax.Array, _Carry]:
        active, split = row.backward_kind == kind, kind is Kind.BACKWARD_INPUT
        own = jnp.where(active, row.backward, -1)
        part = stage.part(row.backward_microbatch)
        x_BSD = stage.input(turns, own, part, carry.inputs, row.backward_input)

        def pull(dy: Callable[[jax.Array], tuple[jax.Array, Params, Sums]], size: int) -> _Pulled:
            weights = stage.weights(own, size)
            if split:
                y, of, own_sums = jax.vjp(lambda x: stage.through(weights, x, own, part), x_BSD, has_aux=True)
            else:
                y, of, own_sums = jax.vjp(lambda w, x: stage.through(w, x, own, part), weights, x_BSD, has_aux=True)
            dy_BSD, of_shared, sums = dy(y[0])
            sums = _add_named(sums, own_sums)
            *of_weights, dx_BSD = of(pulled(y, dy_BSD))
            of_layers = stage.add(carry.layers, own, of_weights[0]) if of_weights else carry.layers
            return dx_BSD, dy_BSD, of_layers, of_shared, sums

        def came(_: jax.Array) -> tuple[jax.Array, Params, Sums]:
            return _take(carry.gradients, row.backward_gradient), carry.shared, carry.sums

        def of_loss(y_BSD: jax.Array) -> tuple[jax.Array, Params, Sums]:
            (of_shared, of_output), sums = jax.grad(end, argnums=(0, 1), has_aux=True)(shared, y_BSD, part)
            return of_output, _add(carry.shared, of_shared), _add_named(carry.sums, sums)

        idle = (stage.none, stage.none, carry.layers, carry.shared, carry.sums)
        which = jnp.where(active & stage.is_last(own), len(inner) + 1, stage.by_size(own, active, inner))
        branches: list[Callable[[], _Pulled]] = [
            lambda: idle,
            *(partial(pull, came, size) for size in inner),
            partial(pull, of_loss, stage.division.sizes[-1]),
        ]
        dx_BSD, dy_BSD, of_layers, of_shared, sums = turns.switch(which, branches)
        # Kept for the weights' half; for whoever it came from, it is there already.
        slot = jnp.where(active, row.backward_gradient, -1)
        kept = _put(carry.gradients, slot, dy_BSD) if split else carry.gradients

        def embedding() -> Params:
            """The first chunk's input has a gradient too: the embedding's."""
            _, of = jax.vjp(lambda shared: task.begin(shared, part), shared)
            return _add(of_shared, of(dx_BSD)[0])

        of_shared = turns.take(active & (stage.chunk_of(own) == 0), embedding, lambda: of_shared)
        return dx_BSD, carry._replace(layers=of_layers, shared=of_shared, sums=sums, gradients=kept)

    def weights_half(turns: Turns, carry: _Carry, row: Row) -> Params:
        own, part = row.weight, stage.part(row.weight_microbatch)
        x_BSD = stage.input(turns, own, part, carry.inputs, row.weight_input)

        def work(size: int) -> Params:
            y, of, _ = jax.vjp(lambda w: stage.through(w, x_BSD, own, part), stage.weights(own, size), has_aux=True)
            dy_BSD = _take(carry.gradients, row.weight_gradient)
            return stage.add(carry.layers, own, of(pulled(y, dy_BSD))[0])

        which = stage.by_size(own, own >= 0, stage.sizes)
        return turns.switch(which, [lambda: carry.layers, *(partial(work, size) for size in stage.sizes)])

    def tick(carry: _Carry, columns: Row) -> tuple[_Carry, None]:
        row = Row(*(column[stage.index] for column in columns))
        turns = Turns()
        carry = carry._replace(
            inputs=_put(carry.inputs, row.input_comes, carry.sent),
            gradients=_put(carry.gradients, row.gradient_comes, carry.sent_back),
        )
        sent, sent_back = forward(turns, carry, row), stage.none
        for kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            if kind in kinds:
                sent_back, carry = backward(turns, carry, row, kind)
        if Kind.BACKWARD_WEIGHT in kinds:
            carry = carry._replace(layers=weights_half(turns, carry, row))
        sent, sent_back = (_to_next(turns.last(value), step) for value, step in ((sent, 1), (sent_back, -1)))
        return carry._replace(sent=sent, sent_back=sent_back), None

    begin = _Carry(
        inputs=_slots(stage.none, input_slots(table).count + 1),
        gradients=_slots(stage.none, gradient_slots(table).count + 1),
        sent=stage.none,
        sent_back=stage.none,
        layers=_zeros(stage.layers),
        shared=_zeros(shared),
        sums=stage.no_sums()[1],
    )
    carry, _ = jax.lax.scan(tick, begin, jax.tree.map(jnp.asarray, rows(table)))
    return jax.lax.psum(carry.sums, STAGE), carry.layers, jax.lax.psum(carry.shared, STAGE)


def _evaluate(stage: _Stage, weight: jax.Array) -> tuple[tuple[jax.Array, Sums], Params, Params]:
    del weight  # sums are asked for
    task, table, shared = stage.task, stage.table, stage.shared
    Sum = tuple[jax.Array, Sums]
    Carry = tuple[jax.Array, jax.Array, Sum]

    def added(sums: Sum, more: tuple[jax.Array | None, Sums]) -> Sum:
        total = sums[0] if more[0] is None else sums[0] + more[0]
        return total, _add_named(sums[1], more[1])

    def tick(carry: Carry, columns: Row) -> tuple[Carry, None]:
        inputs, sent, sums = carry
        row = Row(*(column[stage.index] for column in columns))
        turns, own = Turns(), row.forward
        inputs = _put(inputs, row.input_comes, sent)
        part = stage.part(row.forward_microbatch)
        x_BSD = stage.input(turns, own, part, inputs, row.forward_input)

        def through(size: int) -> tuple[jax.Array, Sum]:
            (y_BSD, loss), metrics = stage.through(stage.weights(own, size), x_BSD, own, part)
            return y_BSD, added(sums, (loss, metrics))

        which = stage.by_size(own, own >= 0, stage.sizes)
        branches: list[Callable[[], tuple[jax.Array, Sum]]] = [lambda: (stage.none, sums)]
        branches += [partial(through, size) for size in stage.sizes]
        y_BSD, sums = turns.switch(which, branches)
        sums = turns.take(
            (own >= 0) & stage.is_last(own), lambda: added(sums, task.end(shared, y_BSD, part)), lambda: sums
        )
        return (inputs, _to_next(turns.last(y_BSD), 1), sums), None

    begin = (_slots(stage.none, input_slots(table).count + 1), stage.none, stage.no_sums())
    (_, _, sums), _ = jax.lax.scan(tick, begin, jax.tree.map(jnp.asarray, rows(table)))
    return jax.lax.psum(sums, STAGE), {}, {}


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda t, m: t + m.astype(t.dtype), total, more)


def _add_named(sums: Sums, more: Sums) -> Sums:
    """Sums, some of which grow."""
    return {**sums, **{name: sums[name] + value for name, value in more.items()}}


def _zeros(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)


def _spec(value: jax.ShapeDtypeStruct) -> P:
    return value.sharding.spec if value.sharding is not None else P()


def _slots(one: jax.Array, count: int) -> jax.Array:
    spec = jax.typeof(one).sharding.spec
    return jnp.zeros((count, *one.shape), one.dtype, out_sharding=P(None, *spec))


def _take(kept: jax.Array, slot: jax.Array) -> jax.Array:
    """What lies in a slot."""
    return jax.lax.dynamic_index_in_dim(kept, jnp.maximum(slot, 0), 0, keepdims=False)


def _put(kept: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """Puts a value into its slot, or into the last one, which nobody reads, where it has none (-1)."""
    at = jnp.where(slot < 0, kept.shape[0] - 1, slot)
    return jax.lax.dynamic_update_index_in_dim(kept, value, at, 0)


def _to_next(value: jax.Array, step: int) -> jax.Array:
    """From each stage to the one `step` on, round the ring."""
    count = jax.lax.axis_size(STAGE)
    return jax.lax.ppermute(value, STAGE, [(s, (s + step) % count) for s in range(count)])
