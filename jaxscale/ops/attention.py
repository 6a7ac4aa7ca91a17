"""Attention behind one function: XLA on every platform, splash on TPU, cuDNN on GPU.

`supports` says what an implementation cannot do; nothing is computed by another one than the caller asked for.
Read next: `attention_xla.py`, the reference; then `attention_splash.py` and `attention_cudnn.py`.

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
) -> Implementation:
    """What `implementation` stands for on a platform. Raises UnsupportedAttention where that cannot compute this.

    Arguments as in `supports`. Models call it at start: a run that cannot work is refused before it leaves any trace.
    """
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
) -> Array:
    """Causal grouped-query attention (Ainslie et al. 2023) with scale 1 / sqrt(K) and a float32 softmax.

    Args:
      q_BSHK: queries, P(rows, None, heads, None): `axes.spec("act_batch", None, "act_heads", None)`.
      k_BTGK, v_BTGK: keys and values, sharded alike; H is a multiple of G, query head h uses key head h // (H / G).
      segment_ids_BS: int32 P(rows, None): positions attend only within equal ids, so that packed documents do not see
        each other; padding has id 0 and attends to itself, which keeps it finite. None: each row is one document.
      window: each position attends to its last `window` positions, itself included; 0 = all of them.
      softcap: scores are bounded to softcap * tanh(scores / softcap); 0 = off.
      implementation: `auto` is splash on TPU, cuDNN on GPU, XLA elsewhere, by the platform of the current mesh (an
        abstract mesh has one if it was made with an `abstract_device`; without one it is XLA).

    Returns (B, S, H, K) in the dtype and sharding of the queries.
    Raises UnsupportedAttention where the implementation cannot do it: never computed by another one silently.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _, S, H, K = q_BSHK.shape
    G = k_BTGK.shape[2]
    if H % G:
        raise UnsupportedAttention(
            f"{H} query heads are not a multiple of {G} key/value heads; use heads of {G} times n"
        )
    chosen = check(
        implementation,
        platform=mesh.abstract_device.platform if mesh.abstract_device is not None else None,
        length=S,
        head_dim=K,
        dtype=q_BSHK.dtype.name,
        softcap=softcap,
        packed=segment_ids_BS is not None,
    )
    q_spec, k_spec = _row_and_head_spec("queries", q_BSHK), _row_and_head_spec("keys", k_BTGK)
    if q_spec != k_spec:
        raise UnsupportedAttention(
            f"queries are sharded as {q_spec} but keys as {k_spec}; the tensor axis has to divide "
            f"both the {H} heads and the {G} key/value heads"
        )
    local = {
        "xla": attention_xla.local_attention,
        "splash": attention_splash.local_attention,
        "cudnn": attention_cudnn.local_attention,
    }[chosen]
    body = functools.partial(local, window=window, softcap=softcap)
    # Rows and heads are independent, so each device computes its own and nothing is communicated.
    mapped = jax.shard_map(
        body,
        in_specs=(q_spec, q_spec, q_spec, None if segment_ids_BS is None else P(q_spec[0], None)),
        out_specs=q_spec,
        axis_names=axes.automatic(),
        check_vma=chosen == "xla",  # the fast kernels do not say over which axes their results vary
    )
    return mapped(q_BSHK, k_BTGK, v_BTGK, segment_ids_BS)


def _row_and_head_spec(what: str, x_BSHK: Array) -> P:
    spec = jax.typeof(x_BSHK).sharding.spec
    rows, positions, heads, head_dim = (spec[dim] if dim < len(spec) else None for dim in range(4))
    if positions is not None or head_dim is not None:
        raise UnsupportedAttention(
            f"attention needs whole rows: {what} of shape {x_BSHK.shape} are sharded as {spec}; "
            "only rows and heads may be sharded, reshard them before"
        )
    return P(rows, None, heads, None)
