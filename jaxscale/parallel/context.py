"""Context parallelism, pure part: which form attention takes over the mesh axis `context`, and who computes what.

A causal mask lets late positions see more than early ones. `ring` and `gather` therefore cut a row into 2 C chunks and
give device i the chunks i and 2 C - 1 - i, an early and a late one: each device then computes equally many pairs of a
query chunk and a key chunk. `ulysses` gives each device whole rows of some heads and keeps the order of the row.
Read next: `ops/attention.py`, which dispatches, then `ops/ring_attention.py`.

Legend: C devices of the axis, r reach: how many chunks before its own a query can see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.config import ConfigError
from jaxscale.config_error import choices

AXIS = "context"
Form = Literal["auto", "gather", "ring", "ulysses"]
BALANCED = ("gather", "ring")
"""Forms that hold a row as an early and a late chunk on each device."""
EARLY, LATE = 0, 1
"""The halves of what a device holds."""


class UnsupportedContext(ConfigError):
    """The form cannot divide this attention over the axis. The message names the sizes that would work."""


def size() -> int:
    """Devices of the current mesh along the axis; 1 = nothing of this is used."""
    return int(jax.sharding.get_abstract_mesh().shape.get(AXIS, 1))


def choose(form: Form, sizes: Mapping[str, int], *, length: int, heads: int, kv_heads: int) -> Form:
    """What `auto` stands for; any other form is returned as it is. Raises UnsupportedContext where it cannot work.

    `auto` is ulysses where each device gets key heads of its own (fewest bytes, and the fast kernel of any platform),
    else ring, else ulysses with copied key heads.

    sizes: of the mesh axes; length: positions of a row; heads, kv_heads: of the model.
    """
    if form != "auto":
        if reason := refusal(form, sizes, length=length, heads=heads, kv_heads=kv_heads):
            raise UnsupportedContext(f"model.context is {form}, but {reason}")
        return form
    of_ulysses, of_ring = (
        refusal(name, sizes, length=length, heads=heads, kv_heads=kv_heads) for name in ("ulysses", "ring")
    )
    if not of_ulysses and (of_ring or head_copies(kv_heads // sizes["tensor"], sizes[AXIS]) == 1):
        return "ulysses"
    if of_ring:
        raise UnsupportedContext(f"no form of context parallelism works: {of_ring}; and {of_ulysses}")
    return "ring"


def is_balanced(form: Form, *, length: int, heads: int, kv_heads: int) -> bool:
    """Whether rows lie in the balanced order on the current mesh. Arguments as of `choose`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return size() > 1 and choose(form, sizes, length=length, heads=heads, kv_heads=kv_heads) in BALANCED


def refusal(form: Form, sizes: Mapping[str, int], *, length: int, heads: int, kv_heads: int) -> str:
    """Why a form cannot divide this attention; empty if it can. Arguments as of `choose`."""
    if form not in get_args(Form):
        return f"it is one of {', '.join(get_args(Form))}"
    context, tensor = sizes[AXIS], sizes["tensor"]
    if context == 1 or form == "auto":
        return ""
    if form in BALANCED:
        if length % (2 * context) == 0:
            return ""
        step = math.lcm(2 * context, context * tensor)  # between blocks `tensor` splits the sequence too
        near = [n for n in (length // step * step, (length // step + 1) * step) if n]
        return (
            f"{form} cuts a row into 2 x mesh.context ({context}) = {2 * context} chunks, which do not divide the "
            f"sequence ({length}); use a sequence of {' or '.join(map(str, near))}, or model.context=ulysses"
        )
    own, own_keys = heads // tensor, kv_heads // tensor
    fits = [c for c in range(1, own + 1) if own % c == 0 and (own_keys % c == 0 or c % own_keys == 0)]
    if context in fits:
        return ""
    return (
        f"ulysses deals the {own} query heads and {own_keys} key/value heads of a device out over mesh.context "
        f"({context}), which does not divide them; use mesh.context {choices(fits)}, or model.context=ring"
    )


def head_copies(kv_heads: int, context: int) -> int:
    """How often ulysses copies each key head, so that every device gets one: 1 where there are enough."""
    return max(1, context // kv_heads)


# The order of positions


def order(length: int, context: int) -> np.ndarray:
    """(length,) int32: the position of the row that lies at each place, devices one after the other, when balanced."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * context, -1)
    return np.concatenate([chunks[list(chunks_of(device, context))].reshape(-1) for device in range(context)])


def chunks_of(device: Any, context: int) -> tuple[Any, Any]:
    """The early and the late chunk of a device."""
    return device, 2 * context - 1 - device


def arrange[Tree](tree: Tree) -> Tree:
    """Arrays (..., S), split over the axis along S, from the row's own order into the balanced one.

    Half of each device's positions go to one device, half to another; nothing is gathered. S is a multiple of 2 C.
    """
    return _exchange(tree, -1, into=True)


def restore(x_BSD: jax.Array) -> jax.Array:
    """(B, S, D) from the balanced order back into the row's own. Differentiable."""
    return _exchange(x_BSD, -2, into=False)


def permute(x: jax.Array, route: Sequence[tuple[int, int]], after: jax.Array | None = None) -> jax.Array:
    """`ppermute` over the axis; on emulated devices not before the permute that gave `after`.

    XLA's CPU backend does not tell two permutes of a program from each other: run at the same time, their devices meet
    in the wrong one. So each is made to depend on the one before, by a comparison that no compiler can decide.
    """
    if after is not None and is_emulated():
        x = jnp.where(after.reshape(-1)[0].astype(jnp.float32) < -3e38, jnp.zeros_like(x), x)
    return jax.lax.ppermute(x, AXIS, route)


def is_emulated() -> bool:
    """Whether the current mesh is one of CPU devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def _exchange(tree: Any, dim: int, into: bool) -> Any:
    context = size()
    if context == 1:
        return tree
    # Of a device's two chunks 2d and 2d + 1 in the row's own order, the even ones go to different devices, and so do
    # the odd ones: two permutations of the devices.
    places = [min(chunk, 2 * context - 1 - chunk) for chunk in range(2 * context)]
    routes = [[(d, places[2 * d + odd]) for d in range(context)] for odd in (0, 1)]

    last: list[tuple[jax.Array, P] | None] = [None]

    def body(x: jax.Array, after: jax.Array) -> jax.Array:
        # On a device with an even number the early chunk is an even one, and the late chunk odd; else the reverse.
        swap = jax.lax.axis_index(AXIS) % 2 == 1
        halves = jnp.split(x, 2, axis=dim)
        if into:
            even = permute(halves[0], routes[0], after)
            odd = permute(halves[1], routes[1], even)
            return jnp.concatenate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], axis=dim)
        even, odd = jnp.where(swap, halves[1], halves[0]), jnp.where(swap, halves[0], halves[1])
        back = [[(target, source) for source, target in route] for route in routes]
        first = permute(even, back[0], after)
        return jnp.concatenate([first, permute(odd, back[1], first)], axis=dim)

    def one(x: jax.Array) -> jax.Array:
        before = jax.typeof(x).sharding.spec
        entries = [*before, *[None] * (x.ndim - len(before))]
        split = P(*entries[: x.ndim + dim], AXIS, *entries[x.ndim + dim + 1 :])
        before, before_spec = (x, split) if last[0] is None else last[0]
        mapped = jax.shard_map(
            body, in_specs=(split, before_spec), out_specs=split, axis_names=axes.automatic(), check_vma=False
        )
        found = mapped(jax.reshard(x, split), jax.reshard(before, before_spec))
        last[0] = found, split
        return jax.reshard(found, P(*entries))

    return jax.tree.map(one, tree)


# Who computes which pair of chunks


def reach(window: int, chunk: int, context: int) -> int:
    """How many chunks before its own a query of a chunk of `chunk` positions can see; 0 window = all."""
    return min(-(-(window - 1) // chunk), 2 * context - 1) if window else 2 * context - 1


def is_needed(query_chunk: Any, key_chunk: Any, reach: int) -> Any:
    """Whether the mask leaves anything of this pair. Of numbers or of traced scalars."""
    return (query_chunk >= key_chunk) & (query_chunk - key_chunk <= reach)


def ring_pairs(device: Any, step: int, source: Any) -> tuple[tuple[Any, Any], ...]:
    """(half of the queries, half of the keys) that a device meets at a step of the ring, when it has `source`'s keys.

    Step 0, its own keys: both diagonals and (late, early). Later steps: (late, early) always, and a second pair, which
    is (early, early) with the keys of a device before it and (late, late) with those of one behind it. Everything else
    is masked out. So each device has two pairs in each step. `device` and `source` may be traced where step > 0.
    """
    if step == 0:
        return (EARLY, EARLY), (LATE, EARLY), (LATE, LATE)
    second = jnp.where(source < device, EARLY, LATE) if isinstance(device, jax.Array) else int(source >= device)
    return (LATE, EARLY), (second, second)


def ring_runs(context: int, reach: int) -> tuple[tuple[int, int], ...]:
    """(first, count) of consecutive steps after step 0 in which any device has a needed pair. Between two runs keys
    jump: a window leaves the neighbours on either side only.
    """
    busy = [step for step in range(1, context) if any(_ring_counts(step, context, reach))]
    runs: list[tuple[int, int]] = []
    for step in busy:
        if runs and sum(runs[-1]) == step:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((step, 1))
    return tuple(runs)


def gather_slots(context: int, reach: int) -> int:
    """How many pairs the gather form walks on each device."""
    return min(2 * context + 1, 2 * (reach + 1))


def gather_pair(device: Any, slot: Any, context: int, reach: int) -> tuple[Any, Any]:
    """(half of the queries, key chunk) of a slot; without a window every slot is a needed pair on every device.

    An early chunk i sees i + 1 chunks, the late one 2 C - i: together always 2 C + 1. With a short window the slots go
    back from each half's own chunk instead; a chunk below 0 is none.
    """
    if gather_slots(context, reach) == 2 * context + 1:
        late = slot > device
        return late * 1, slot - late * (device + 1)
    half, back = slot // (reach + 1), slot % (reach + 1)
    early, last = chunks_of(device, context)
    return half, early + half * (last - early) - back


def computed_pairs(form: Form, context: int, reach: int) -> list[list[tuple[int, int]]]:
    """For each device the (query chunk, key chunk) pairs that it computes. What `ring` and `gather` do, as data."""
    found: list[list[tuple[int, int]]] = []
    for device in range(context):
        mine = chunks_of(device, context)
        if form == "gather":
            slots = (gather_pair(device, slot, context, reach) for slot in range(gather_slots(context, reach)))
            pairs = [(mine[half], key) for half, key in slots]
        else:
            steps = [0, *(first + i for first, count in ring_runs(context, reach) for i in range(count))]
            pairs = [pair for step in steps for pair in _ring_chunks(device, step, context)]
        found.append([(q, k) for q, k in pairs if k >= 0 and is_needed(q, k, reach)])
    return found


def _ring_chunks(device: int, step: int, context: int) -> Iterator[tuple[int, int]]:
    source = (device - step) % context
    for query, key in ring_pairs(device, step, source):
        yield chunks_of(device, context)[query], chunks_of(source, context)[key]


def _ring_counts(step: int, context: int, reach: int) -> list[int]:
    return [sum(is_needed(q, k, reach) for q, k in _ring_chunks(d, step, context)) for d in range(context)]


def bytes_per_layer(
    form: Form, *, tokens: int, heads: int, kv_heads: int, head_dim: int, context: int, element: int
) -> tuple[float, float]:
    """Bytes that a device sends in one layer: (forward, backward without what rematerialisation repeats).

    tokens: of one device (rows x positions); heads, kv_heads: of one device; element: bytes of the compute dtype.
    Gradients of keys and values travel in float32, but for ulysses. Segment ids, 4 bytes a token, are left out.
    """
    keys, others = 2 * tokens * kv_heads * head_dim, context - 1
    if form in BALANCED:
        back = context if form == "ring" else others  # those of the ring go home at the end
        return float(keys * element * others), float(keys * element * others + keys * 4 * back)
    moved = (2 * tokens * heads * head_dim + keys * head_copies(kv_heads, context)) * element * others / context
    return moved, moved
