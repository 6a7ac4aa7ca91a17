"""Attention behind one function: XLA on every platform, splash on TPU, cuDNN on GPU; over `context` in three forms.

`supports` says what an implementation cannot do; nothing is computed by another one than the caller asked for.
Read next: `attention_xla.py`, the reference; `attention_splash.py` and `attention_cudnn.py`; for rows that are split
over `context`, `parallel/context.py` and `balanced_attention.py`.

Shapes: B rows, S queries, T keys (= S), H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxscale import axes
from jaxscale.config import ConfigError
from jaxscale.ops import attention_cudnn, attention_splash, attention_xla
from jaxscale.ops.balanced_attention import balanced_attention
from jaxscale.ops.blockwise import Scores
from jaxscale.ops.gathered_attention import GATHER
from jaxscale.ops.ring_attention import RING
from jaxscale.ops.ulysses import ulysses_attention
from jaxscale.parallel import context as over_context

Implementation = Literal["auto", "xla", "splash", "cudnn"]

BY_PLATFORM: dict[str, Implementation] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
"""What `auto` means; `xla` on platforms that are not named."""


PLATFORMS: dict[str, tuple[str, ...]] = {"splash": ("tpu",), "cudnn": ("gpu", "cuda")}
"""Where a kernel runs; those not named run everywhere."""


class UnsupportedAttention(ConfigError):
    """The chosen implementation cannot compute this attention. The message names the setting to change."""


def choose(implementation: Implementation, platform: str | None) -> Implementation:
    """What `auto` stands for on a platform (None = not known: xla); any other name is returned as it is."""
    if implementation not in get_args(Implementation):
        raise UnsupportedAttention(
            f"model.attention is {implementation!r}; it is one of {', '.join(get_args(Implementation))}"
        )
    return BY_PLATFORM.get(platform or "", "xla") if implementation == "auto" else implementation


def supports(
    implementation: Implementation,
    *,
    platform: str | None,
    length: int,
    head_dim: int,
    dtype: str,
    softcap: float,
    packed: bool,
) -> str:
    """Why an implementation cannot compute this attention; empty if it can.

    `platform`: of the devices, None = not known; `length`: positions of a row; `dtype`: name of the compute dtype;
    `packed`: segment ids are given. Pure: needs no hardware.
    """
    places = PLATFORMS.get(implementation)
    if platform is not None and places is not None and platform not in places:
        return f"the {implementation} kernel runs on {places[0]} only and this is {platform}; use auto"
    if implementation == "splash":
        return attention_splash.refusal(length=length, head_dim=head_dim, dtype=dtype)
    if implementation == "cudnn":
        return attention_cudnn.refusal(length=length, head_dim=head_dim, dtype=dtype, softcap=softcap, packed=packed)
    return ""


def check(
    implementation: Implementation,
    *,
    platform: str | None,
    length: int,
    head_dim: int,
    dtype: str,
    softcap: float,
    packed: bool,
    form: over_context.Form | None = None,
) -> Implementation:
    """What `implementation` stands for on a platform. Raises UnsupportedAttention where that cannot compute this.

    Arguments as in `supports`; form: how rows are divided over mesh.context, None where they are not. Models call it at
    start: a run that cannot work is refused before it leaves any trace.
    """
    if form in over_context.BALANCED:
        if implementation not in ("auto", "xla"):
            raise UnsupportedAttention(
                f"model.attention is {implementation}, a kernel of whole rows, and model.context={form} divides rows; "
                "use model.context=ulysses, or model.attention=auto"
            )
        return "xla"
    chosen = choose(implementation, platform)
    reason = supports(
        chosen, platform=platform, length=length, head_dim=head_dim, dtype=dtype, softcap=softcap, packed=packed
    )
    if reason:
        asked = f"auto chose {chosen} for {platform}" if implementation == "auto" else f"model.attention is {chosen}"
        raise UnsupportedAttention(f"{asked}, but {reason}, or set model.attention=xla to use the slower XLA path")
    return chosen


def attention(
    q_BSHK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    *,
    segment_ids_BS: Array | None,
    window: int = 0,
    softcap: float = 0.0,
    implementation: Implementation = "auto",
    context: over_context.Form = "auto",
) -> Array:
    """Causal grouped-query attention (Ainslie et al. 2023) with scale 1 / sqrt(K) and a float32 softmax.

    Args:
      q_BSHK: queries, P(rows, positions, heads, None): rows and heads as `axes.spec("act_batch", ..., "act_heads")`;
        positions None, or "context": the forms `ring` and `gather` then want the order `parallel.context.order`.
      k_BTGK, v_BTGK: keys and values, sharded alike; H is a multiple of G, query head h uses key head h // (H / G).
      segment_ids_BS: int32 P(rows, None or "context"): positions attend only within equal ids, so that packed documents
        do not see each other; padding has id 0 and attends to itself, which keeps it finite. None: each row is one
        document.
      window: each position attends to its last `window` positions, itself included; 0 = all of them.
      softcap: scores are bounded to softcap * tanh(scores / softcap); 0 = off.
      implementation: `auto` is splash on TPU, cuDNN on GPU, XLA elsewhere, by the platform of the current mesh (an
        abstract mesh has one if it was made with an `abstract_device`; without one it is XLA).
      context: where positions are split over more than one device, how they come together (`parallel.context.choose`).

    Returns (B, S, H, K) in the dtype and sharding of the queries.
    Raises UnsupportedAttention where the implementation cannot do it, UnsupportedContext where the form cannot: never
    computed by another one silently.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _, S, H, K = q_BSHK.shape
    G = k_BTGK.shape[2]
    if H % G:
        raise UnsupportedAttention(
            f"{H} query heads are not a multiple of {G} key/value heads; use heads of {G} times n"
        )
    q_spec, k_spec = _spec("queries", q_BSHK), _spec("keys", k_BTGK)
    if q_spec != k_spec:
        raise UnsupportedAttention(
            f"queries are sharded as {q_spec} but keys as {k_spec}; the tensor axis has to divide "
            f"both the {H} heads and the {G} key/value heads"
        )
    split = over_context.size() if q_spec[1] is not None else 1
    form = over_context.choose(context, mesh.shape, length=S, heads=H, kv_heads=G) if split > 1 else None
    chosen = check(
        implementation,
        platform=mesh.abstract_device.platform if mesh.abstract_device is not None else None,
        length=S,
        head_dim=K,
        dtype=q_BSHK.dtype.name,
        softcap=softcap,
        packed=segment_ids_BS is not None,
        form=form,
    )
    ids_spec = P(q_spec[0], q_spec[1] if form in over_context.BALANCED else None)
    ids_BS = None if segment_ids_BS is None else jax.reshard(segment_ids_BS, ids_spec)
    if form in over_context.BALANCED:
        walk = RING if form == "ring" else GATHER
        return balanced_attention(walk, Scores(window, softcap), q_BSHK, k_BTGK, v_BTGK, ids_BS)
    local = {
        "xla": attention_xla.local_attention,
        "splash": attention_splash.local_attention,
        "cudnn": attention_cudnn.local_attention,
    }[chosen]
    body = functools.partial(local, window=window, softcap=softcap)
    check_vma = chosen == "xla"  # the fast kernels do not say over which axes their results vary
    if form == "ulysses":
        return ulysses_attention(body, q_BSHK, k_BTGK, v_BTGK, ids_BS, check_vma=check_vma)
    # Rows and heads are independent, so each device computes its own and nothing is communicated.
    mapped = jax.shard_map(
        body,
        in_specs=(q_spec, q_spec, q_spec, None if ids_BS is None else ids_spec),
        out_specs=q_spec,
        axis_names=axes.automatic(),
        check_vma=check_vma,
    )
    return mapped(q_BSHK, k_BTGK, v_BTGK, ids_BS)


def _spec(what: str, x_BSHK: Array) -> P:
    spec = jax.typeof(x_BSHK).sharding.spec
    rows, positions, heads, head_dim = (spec[dim] if dim < len(spec) else None for dim in range(4))
    if positions not in (None, over_context.AXIS) or head_dim is not None:
        raise UnsupportedAttention(
            f"attention needs whole rows: {what} of shape {x_BSHK.shape} are sharded as {spec}; only rows and heads "
            f"may be sharded, and positions over {over_context.AXIS!r}, reshard them before"
        )
    return P(rows, positions, heads, None)
