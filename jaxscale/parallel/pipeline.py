"""The pipeline runtime: executes any schedule table, with every other parallelism inside a stage.

One program for all stages: a scan over the ticks of the table, manual over the mesh axis `stage` alone. In a tick a
stage does what its row says (a forward, a backward, a weights' half, or nothing), then activations go one stage on and
gradients one stage back. A backward computes its chunk's forward again from the chunk's input, which is all that is
kept, in a slot that the table assigned (`buffers.py`). The first chunk begins with the embedding, the last one ends
with the head, each only there, so that no other stage pays for them.

Legend: M microbatches, B rows of a microbatch, S sequence, D width, n layers of a chunk. Read next: `schedules.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale.parallel.buffers import gradient_slots, input_slots
from jaxscale.parallel.costs import make_table
from jaxscale.parallel.rows import Row, rows
from jaxscale.parallel.schedules import Kind, Table, forward_only
from jaxscale.parallel.turns import Turns
from jaxscale.task import Batch, LayeredTask, Params

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
    table = make_table(task.pipeline.schedule, stages(), parts["tokens"].shape[0], task.pipeline.chunks)
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
        self.count = jax.tree.leaves(layers)[0].shape[0] // table.chunks
        """Layers of a chunk."""
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

    def weights(self, own: jax.Array) -> Params:
        """Of the layers of one of the stage's own chunks."""
        if self.table.chunks == 1:
            return self.layers
        begin = own * self.count
        return jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, begin, self.count), self.layers)

    def add(self, total: Params, own: jax.Array, gradients: Params) -> Params:
        """Adds gradients of one of the stage's own chunks."""
        if self.table.chunks == 1:
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradients)

        def into(t: jax.Array, g: jax.Array) -> jax.Array:
            begin = own * self.count
            before = jax.lax.dynamic_slice_in_dim(t, begin, self.count)
            return jax.lax.dynamic_update_slice_in_dim(t, before + g.astype(t.dtype), begin, 0)

        return jax.tree.map(into, total, gradients)

    def input(self, turns: Turns, own: jax.Array, part: Batch, kept: jax.Array, slot: jax.Array) -> jax.Array:
        """The input of a chunk: made from the tokens for the first one, else what lies in its slot. (B, S, D)"""
        return turns.take(
            (own >= 0) & (self.chunk_of(own) == 0),
            lambda: self.task.begin(self.shared, part),
            lambda: _take(kept, slot),
        )

    def through(self, weights: Params, x_BSD: jax.Array, own: jax.Array, part: Batch) -> jax.Array:
        """A chunk's layers."""
        return self.task.through(weights, x_BSD, part, self.key, self.chunk_of(own) * self.count)

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

    def end(shared: Params, y_BSD: jax.Array, part: Batch) -> tuple[jax.Array, Sums]:
        total, sums = task.end(shared, y_BSD, part)
        return total / weight, sums

    sums_shape = jax.eval_shape(lambda: task.end(shared, stage.none, stage.part(0))[1])
    no_sums = {name: jnp.zeros(value.shape, value.dtype) for name, value in sums_shape.items()}

    def forward(turns: Turns, carry: _Carry, row: Row) -> jax.Array:
        own, part = row.forward, stage.part(row.forward_microbatch)
        x_BSD = stage.input(turns, own, part, carry.inputs, row.forward_input)
        # The last chunk's output is computed with its gradient, and nobody wants it before.
        return turns.take(
            (own >= 0) & ~stage.is_last(own),
            lambda: stage.through(stage.weights(own), x_BSD, own, part),
            lambda: stage.none,
        )

    def backward(turns: Turns, carry: _Carry, row: Row, kind: Kind) -> tuple[jax.Array, _Carry]:
        active, split = row.backward_kind == kind, kind is Kind.BACKWARD_INPUT
        own = jnp.where(active, row.backward, -1)
        part = stage.part(row.backward_microbatch)
        x_BSD = stage.input(turns, own, part, carry.inputs, row.backward_input)

        def pull(dy: Callable[[jax.Array], tuple[jax.Array, Params, Sums]]) -> _Pulled:
            weights = stage.weights(own)
            if split:
                y_BSD, of = jax.vjp(lambda x: stage.through(weights, x, own, part), x_BSD)
            else:
                y_BSD, of = jax.vjp(lambda w, x: stage.through(w, x, own, part), weights, x_BSD)
            dy_BSD, of_shared, sums = dy(y_BSD)
            *of_weights, dx_BSD = of(dy_BSD)
            of_layers = stage.add(carry.layers, own, of_weights[0]) if of_weights else carry.layers
            return dx_BSD, dy_BSD, of_layers, of_shared, sums

        def came(_: jax.Array) -> tuple[jax.Array, Params, Sums]:
            return _take(carry.gradients, row.backward_gradient), carry.shared, carry.sums

        def of_loss(y_BSD: jax.Array) -> tuple[jax.Array, Params, Sums]:
            (of_shared, of_output), sums = jax.grad(end, argnums=(0, 1), has_aux=True)(shared, y_BSD, part)
            return of_output, _add(carry.shared, of_shared), _add(carry.sums, sums)

        idle = (stage.none, stage.none, carry.layers, carry.shared, carry.sums)
        which = jnp.where(active, jnp.where(stage.is_last(own), 2, 1), 0)
        branches: list[Callable[[], _Pulled]] = [lambda: idle, partial(pull, came), partial(pull, of_loss)]
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

        def work() -> Params:
            _, of = jax.vjp(lambda w: stage.through(w, x_BSD, own, part), stage.weights(own))
            return stage.add(carry.layers, own, of(_take(carry.gradients, row.weight_gradient))[0])

        return turns.take(own >= 0, work, lambda: carry.layers)

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
        sums=no_sums,
    )
    carry, _ = jax.lax.scan(tick, begin, jax.tree.map(jnp.asarray, rows(table)))
    return jax.lax.psum(carry.sums, STAGE), carry.layers, jax.lax.psum(carry.shared, STAGE)


def _evaluate(stage: _Stage, weight: jax.Array) -> tuple[tuple[jax.Array, Sums], Params, Params]:
    del weight  # sums are asked for
    task, table, shared = stage.task, stage.table, stage.shared
    shapes = jax.eval_shape(lambda: task.end(shared, stage.none, stage.part(0)))
    nothing = jax.tree.map(lambda value: jnp.zeros(value.shape, value.dtype), shapes)
    Carry = tuple[jax.Array, jax.Array, Any]

    def tick(carry: Carry, columns: Row) -> tuple[Carry, None]:
        inputs, sent, sums = carry
        row = Row(*(column[stage.index] for column in columns))
        turns, own = Turns(), row.forward
        inputs = _put(inputs, row.input_comes, sent)
        part = stage.part(row.forward_microbatch)
        x_BSD = stage.input(turns, own, part, inputs, row.forward_input)
        y_BSD = turns.take(own >= 0, lambda: stage.through(stage.weights(own), x_BSD, own, part), lambda: stage.none)
        sums = turns.take(
            (own >= 0) & stage.is_last(own), lambda: _add(sums, task.end(shared, y_BSD, part)), lambda: sums
        )
        return (inputs, _to_next(turns.last(y_BSD), 1), sums), None

    begin = (_slots(stage.none, input_slots(table).count + 1), stage.none, nothing)
    (_, _, sums), _ = jax.lax.scan(tick, begin, jax.tree.map(jnp.asarray, rows(table)))
    return jax.lax.psum(sums, STAGE), {}, {}


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda t, m: t + m.astype(t.dtype), total, more)


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
