"""Attention in plain einsums: runs on every platform, supports everything, is the reference of the fast kernels.

Scores are float32 and exist for at most `SCORE_BYTES` at a time; longer rows are walked in chunks of queries.
Read next: `attention.py`, which shards and dispatches.

Shapes: B rows, S queries, T keys (= S), H query heads, G key/value heads, R = H / G, K head dim. All of one device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

SCORE_BYTES = 128 << 20
"""Bound of one device's float32 scores: queries are chunked so that (B, H, chunk, T) stays below it."""

SHORTEST_PART = 128
"""Queries below which splitting a row once more costs more than the keys it saves (measured on CPU)."""


def attend(q_BSHK: Array, k_BTGK: Array, v_BTGK: Array, mask_BST: Array, *, softcap: float) -> Array:
    """Masked grouped-query attention of local arrays, (B, S, H, K) in the dtype of the values.

    The softmax is float32. A query whose mask row is all False gets the mean of the values, never NaN.
    `softcap` c > 0 bounds scores to c * tanh(scores / c) (Gemma 2, section 2); 0 is off.
    """
    B, S, H, K = q_BSHK.shape
    G = k_BTGK.shape[2]
    # Heads before positions: the two batched matmuls then need no transposition inside, the fastest order on CPU.
    q_BGRSK = q_BSHK.reshape(B, S, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGTK, v_BGTK = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BGRSK,BGTK->BGRST", q_BGRSK, k_BGTK, preferred_element_type=jnp.float32) * K**-0.5
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BST[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTGK.dtype)
    out_BGRSK = jnp.einsum("BGRST,BGTK->BGRSK", weights, v_BGTK)
    return out_BGRSK.transpose(0, 3, 1, 2, 4).reshape(B, S, H, K)


def position_mask(query_S: Array, key_T: Array, window: int) -> Array:
    """Bool (1, S, T): the key's position is not after the query's, and among its last `window` ones (0 = all)."""
    query, key = query_S[None, :, None], key_T[None, None, :]
    return (key <= query) & (key > query - window) if window else key <= query


def segment_mask(query_ids_BS: Array, key_ids_BT: Array) -> Array:
    """Bool (B, S, T): query and key lie in the same segment."""
    return query_ids_BS[:, :, None] == key_ids_BT[:, None, :]


def query_parts(length: int) -> int:
    """Into how many parts a row's queries are cut; part i of n needs only the first (i + 1) / n of the keys."""
    return next(
        parts for parts in (4, 2, 1) if parts == 1 or (length % parts == 0 and length // parts >= SHORTEST_PART)
    )


def query_chunks(queries: int, score_bytes_per_query: int) -> tuple[int, int]:
    """(number of chunks, queries per chunk) that keep a chunk's scores within SCORE_BYTES; chunks are even."""
    most = max(1, SCORE_BYTES // score_bytes_per_query)
    count = -(-queries // most)
    return count, -(-queries // count)


def local_attention(
    q_BSHK: Array, k_BTGK: Array, v_BTGK: Array, segment_ids_BS: Array | None, *, window: int, softcap: float
) -> Array:
    """Causal attention within segments on one device's rows and heads; same contract as `attention.attention`."""
    length = q_BSHK.shape[1]
    size = length // query_parts(length)
    parts = []
    for start in range(0, length, size):
        end, first_key = start + size, max(0, start - window + 1) if window else 0
        query_ids = key_ids = None
        if segment_ids_BS is not None:
            query_ids, key_ids = segment_ids_BS[:, start:end], segment_ids_BS[:, first_key:end]
        keys, values = k_BTGK[:, first_key:end], v_BTGK[:, first_key:end]
        parts.append(_part(q_BSHK[:, start:end], keys, values, query_ids, key_ids, window, softcap))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _part(
    q_BSHK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    query_ids_BS: Array | None,
    key_ids_BT: Array | None,
    window: int,
    softcap: float,
) -> Array:
    """Attention of consecutive queries, the last of which is at the last key."""
    B, S, H, _ = q_BSHK.shape
    T = k_BTGK.shape[1]
    count, chunk = query_chunks(S, 4 * B * H * T)
    # With a window, a chunk of queries sees only the keys from `window - 1` before its first query on.
    seen = min(T, chunk + window - 1) if window else T

    def one_chunk(start: Array | int, q: Array, k: Array, v: Array, q_ids: Array | None, k_ids: Array | None) -> Array:
        first_query = T - S + start
        first_key = jnp.clip(first_query + chunk - seen, 0, T - seen)
        mask = position_mask(first_query + jnp.arange(chunk), first_key + jnp.arange(seen), window)
        if q_ids is not None and k_ids is not None:
            mask &= segment_mask(_slice(q_ids, start, chunk), _slice(k_ids, first_key, seen))
        keys, values = _slice(k, first_key, seen), _slice(v, first_key, seen)
        return attend(_slice(q, start, chunk), keys, values, mask, softcap=softcap)

    if count == 1:
        return one_chunk(0, q_BSHK, k_BTGK, v_BTGK, query_ids_BS, key_ids_BT)

    padding = count * chunk - S  # queries past the end, cut off below
    q_BSHK = jnp.pad(q_BSHK, ((0, 0), (0, padding), (0, 0), (0, 0)))
    query_ids_BS = None if query_ids_BS is None else jnp.pad(query_ids_BS, ((0, 0), (0, padding)))
    # The scores of a chunk are recomputed in the backward pass: kept, they would add up to the whole matrix.
    recomputed = jax.checkpoint(one_chunk, prevent_cse=False)

    def step(carry: None, start: Array) -> tuple[None, Array]:
        return carry, recomputed(start, q_BSHK, k_BTGK, v_BTGK, query_ids_BS, key_ids_BT)

    _, out_NBCHK = jax.lax.scan(step, None, jnp.arange(0, count * chunk, chunk))
    return out_NBCHK.swapaxes(0, 1).reshape(q_BSHK.shape)[:, :S]


def _slice(x: Array, start: Array | int, length: int) -> Array:
    return x if length == x.shape[1] else jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)
