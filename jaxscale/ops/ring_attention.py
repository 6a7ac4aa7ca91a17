"""Ring attention: keys and values travel round the devices of `context`, and no device ever holds a whole row of them.

At each step a device attends to the keys that it has while they already travel on to the next device (Liu et al. 2023,
"Ring Attention"). Rows lie in the balanced order of `parallel/context.py`, so that all devices have the same work in
each step. The backward pass is a ring too: keys and values go round once more, and their gradients with them.
Read next: `halves.py`, the work of one step; `gathered_attention.py`, the same without travelling.

Shapes: B rows, S positions of a device, c = S / 2 of a chunk, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxscale.ops import halves
from jaxscale.ops.balanced_attention import Walk
from jaxscale.ops.blockwise import Keys, Running, Scores
from jaxscale.ops.halves import Device
from jaxscale.parallel import context
from jaxscale.parallel.context import AXIS


class Travelling(NamedTuple):
    """What goes round: both halves of a device's keys. Their positions follow from the step."""

    k_2BGcK: Array
    v_2BGcK: Array
    ids_2Bc: Array | None


def _walk(scores: Scores, q_BSHK: Array, k_BSGK: Array, v_BSGK: Array, ids_BS: Array | None) -> tuple[Array, Array]:
    device = halves.this_device(scores, q_BSHK, k_BSGK.shape[2], ids_BS)

    def visit(running_2: Running, step: Array | int, travelling: Travelling, *_: Any) -> Running:
        for half, _, keys, chunk in _pairs(device, step, travelling):
            running_2 = device.attend(running_2, half, keys, chunk)
        return running_2

    own = Travelling(halves.of_keys(k_BSGK), halves.of_keys(v_BSGK), halves.of_ids(ids_BS))
    return device.result(_go_round(device, own, device.no_softmax(), visit)[0], q_BSHK)


def _walk_back(
    scores: Scores,
    q_BSHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    ids_BS: Array | None,
    out_BSHK: Array,
    lse_BSH: Array,
    gradient_BSHK: Array,
) -> tuple[Array, Array, Array]:
    groups = k_BSGK.shape[2]
    device = halves.this_device(scores, q_BSHK, groups, ids_BS)
    finished_2 = halves.finished(out_BSHK, lse_BSH, gradient_BSHK, groups)
    own = Travelling(halves.of_keys(k_BSGK), halves.of_keys(v_BSGK), halves.of_ids(ids_BS))
    none_2 = jnp.zeros(own.k_2BGcK.shape, jnp.float32)

    class State(NamedTuple):
        of_q_2: Array
        of_keys_2: tuple[Array, Array]
        """Gradients of the keys and values that visited last, by all queries that they have met on their way."""

    def visit(state: State, step: Array | int, travelling: Travelling, moved: int, sent: Any) -> State:
        # These begin before the work, which adds to them only at its end: so they hide behind it as the keys do.
        before = _rotate(state.of_keys_2, moved, sent) if moved else state.of_keys_2
        of_q_2, of_k_2, of_v_2 = state.of_q_2, none_2, none_2
        for half, key_half, keys, chunk in _pairs(device, step, travelling):
            of_q_2, (of_k, of_v) = device.pull(of_q_2, finished_2, half, keys, chunk)
            of_k_2, of_v_2 = of_k_2.at[key_half].add(of_k), of_v_2.at[key_half].add(of_v)
        share = of_k_2, of_v_2
        return State(of_q_2, jax.tree.map(jnp.add, before, share))

    of_q_2 = jnp.zeros(device.queries_2.q_BGRSK.shape, jnp.float32)
    state, last = _go_round(device, own, State(of_q_2, (none_2, none_2)), visit)
    of_keys = _rotate(state.of_keys_2, -last) if last else state.of_keys_2
    of_k, of_v = (halves.united_keys(x).astype(k_BSGK.dtype) for x in of_keys)
    return halves.united_queries(state.of_q_2).astype(q_BSHK.dtype), of_k, of_v


def _go_round[State](
    device: Device, own: Travelling, state: State, visit: Callable[[State, Any, Travelling, int, Any], State]
) -> tuple[State, int]:
    """Folds `visit(state, step, keys at hand, steps since the visit before, keys sent on)` over the steps with work.

    Returns the last step too: how far from home the keys are by then.
    """
    runs = context.ring_runs(device.context, device.reach)
    if not runs:
        return visit(state, 0, own, 0, None), 0
    arriving = _rotate(own, runs[0][0])
    state, at = visit(state, 0, own, 0, None), 0

    def stay_and_go_on(state: State, step: Any, travelling: Travelling, moved: int, jump: int) -> Any:
        # The keys travel on before the work with them begins: that is what hides their way.
        following = _rotate(travelling, jump) if jump else travelling
        return visit(state, step, travelling, moved, following if jump else None), following

    for number, (first, count) in enumerate(runs):
        last = first + count - 1
        if first - at > 1 and count > 1:
            state, arriving = stay_and_go_on(state, first, arriving, first - at, 1)
            at, first = first, first + 1
        if first < last:
            (state, arriving), _ = jax.lax.scan(
                lambda carry, step: (stay_and_go_on(carry[0], step, carry[1], 1, 1), None),
                (state, arriving),
                jnp.arange(first, last),
            )
            at = last - 1
        jump = runs[number + 1][0] - last if number + 1 < len(runs) else 0
        state, arriving = stay_and_go_on(state, last, arriving, last - at, jump)
        at = last
    return state, at


def _pairs(device: Device, step: Any, travelling: Travelling) -> list[tuple[Any, Any, Keys, Any]]:
    """(half of the queries, half of the keys, keys, their chunk) of one step."""
    source = (device.index - step) % device.context
    is_own = isinstance(step, int) and step == 0
    found = []
    for half, key_half in context.ring_pairs(device.index, 0 if is_own else 1, source):
        early, late = context.chunks_of(source, device.context)
        chunk = jnp.where(jnp.asarray(key_half) == context.EARLY, early, late)
        k, v = travelling.k_2BGcK[key_half], travelling.v_2BGcK[key_half]
        ids = None if travelling.ids_2Bc is None else travelling.ids_2Bc[key_half]
        found.append((half, key_half, Keys(k, v, halves.positions(chunk, device.chunk), ids), chunk))
    return found


def _rotate[Tree](tree: Tree, by: int, after: Any = None) -> Tree:
    """From each device to the one `by` further round the ring; `after`: what `_rotate` gave before in this step."""
    size = jax.lax.axis_size(AXIS)
    leaves, form = jax.tree.flatten(tree)
    if _permutes_wait_for_all():
        return jax.tree.unflatten(form, [_rotate_by_exchange(x, by, size) for x in leaves])
    route = [(d, (d + by) % size) for d in range(size)]
    moved, last = [], next(iter(jax.tree.leaves(after)[-1:]), None)
    for x in leaves:
        last = context.permute(x, route, last)
        moved.append(last)
    return jax.tree.unflatten(form, moved)


def _permutes_wait_for_all() -> bool:
    """XLA's CPU backend begins a permute when *all* devices of the program have come to it. Those of the other pipeline
    stages do not, who are in another branch; an all-to-all only waits for its own group.
    """
    return jax.sharding.get_abstract_mesh().shape["stage"] > 1 and context.is_emulated()


def _rotate_by_exchange(x: Array, by: int, size: int) -> Array:
    index = jax.lax.axis_index(AXIS)
    parcels = jnp.zeros((size, *x.shape), x.dtype).at[(index + by) % size].set(x)
    return jax.lax.all_to_all(parcels, AXIS, 0, 0)[(index - by) % size]


RING = Walk(_walk, _walk_back)
