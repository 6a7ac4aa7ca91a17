"""Cross-entropy of a language-model head that never holds the float32 logits of all tokens.

Tokens are walked in chunks; when differentiated, the gradients are computed in the same walk, so that each chunk's
logits exist once. The vocabulary stays sharded over `tensor`, and over groups of `fsdp` devices that bring their tokens
together (`layers/vocabulary_groups.py`). Read next: `models/transformer.py`, which calls it.

Shapes: B rows, S positions, D model width, V vocabulary; inside the manual region those of one device, B * S tokens in
chunks of C, N = G * C of them with those that the G devices of a group bring.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxscale import axes
from jaxscale.layers.vocabulary_groups import AXIS, Groups, head_groups

LOGIT_BYTES = 512 << 20
"""`chunk=0`: as many tokens as have float32 logits of this size on one device."""

TOKEN_AXES = (*axes.BATCH_AXES, "context")
"""Mesh axes over which tokens are split."""


@dataclass(frozen=True)
class _Options:
    z_loss: float
    softcap: float
    chunk: int
    compute_dtype: DTypeLike
    reduce_dtype: DTypeLike
    tied: bool
    sequence_sharded: bool  # hidden: over tensor too
    most_members: int
    token_axes: tuple[str, ...]  # those of TOKEN_AXES that no surrounding region has made manual


def cross_entropy(
    hidden_BSD: Array,
    head_DV: Array,
    targets_BS: Array,
    loss_weight_BS: Array,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
    compute_dtype: DTypeLike = jnp.bfloat16,
    reduce_dtype: DTypeLike = jnp.float32,
    tied: bool = False,
    most_members: int = 0,
) -> tuple[Array, dict[str, Array]]:
    """Weighted sum over tokens of -log p(target) + z_loss * log(Z)^2, Z the softmax's denominator (PaLM, section 5).

    Args:
      hidden_BSD: final activations, sharded as axes.spec("act_batch", "act_residual_sequence" or "act_sequence", None).
      head_DV: weights, axes.spec("embed", "vocab"), any float dtype; if `tied`, the (V, D) embedding table
        of axes.spec("vocab", "embed").
      targets_BS: int32 token ids in [0, V), axes.spec("act_batch", "act_sequence"); any value where the weight is 0.
      loss_weight_BS: float weights per token, sharded as the targets.
      softcap: logits are bounded to softcap * tanh(logits / softcap); 0 = off (Gemma 2, section 2).
      chunk: tokens per device whose logits exist at once; 0 = as many as fit in LOGIT_BYTES.
      compute_dtype: dtype of the matmuls' inputs; logits, softmax and sums are float32.
      reduce_dtype: dtype in which the head's gradient is summed over devices (within a device: float32).
      most_members: devices of `fsdp` that share the vocabulary at most; 0 = what moves the fewest bytes, 1 = none do.

    Returns the sum, float32, differentiable in hidden, head and loss_weight; and metrics without gradient, float32
    sums too: `loss` (the cross-entropy alone), `z_loss` (its term of the sum) and `weight` (of the tokens). The mean is
    the sum over the weight of the whole batch, not of a microbatch. Raises ValueError for shapes that do not fit.
    """
    V, D = head_DV.shape if tied else head_DV.shape[::-1]
    if (
        hidden_BSD.shape[-1] != D
        or hidden_BSD.shape[:2] != targets_BS.shape
        or targets_BS.shape != loss_weight_BS.shape
    ):
        raise ValueError(
            f"shapes do not fit: hidden {hidden_BSD.shape}, head of width {D} and vocabulary {V}, "
            f"targets {targets_BS.shape}, loss_weight {loss_weight_BS.shape}"
        )
    if chunk < 0 or z_loss < 0 or softcap < 0:
        raise ValueError(f"chunk ({chunk}), z_loss ({z_loss}) and softcap ({softcap}) are 0 (off) or more")
    positions = (*jax.typeof(hidden_BSD).sharding.spec, None, None)[1]
    sequence_sharded = "tensor" in (positions if isinstance(positions, tuple) else (positions,))
    token_axes = tuple(axis for axis in TOKEN_AXES if axis in axes.automatic())
    options = _Options(
        z_loss, softcap, chunk, compute_dtype, reduce_dtype, tied, sequence_sharded, most_members, token_axes
    )
    hidden_BSD = jax.reshard(hidden_BSD, _hidden_spec(options))
    head_DV = jax.reshard(head_DV, axes.spec(*_head_axes(options)))
    tokens = axes.spec("act_batch", "act_sequence")
    return _total(
        options,
        hidden_BSD,
        head_DV,
        jax.reshard(targets_BS, tokens),
        jax.reshard(loss_weight_BS.astype(jnp.float32), tokens),
    )


def chunk_size(tokens: int, vocabulary: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, tokens per chunk) for one device's tokens and a group's share of the vocabulary; chunks are
    even.
    """
    most = chunk or max(1, LOGIT_BYTES // (4 * vocabulary))
    count = -(-tokens // most)
    return count, -(-tokens // count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    options: _Options, hidden_BSD: Array, head_DV: Array, targets_BS: Array, loss_weight_BS: Array
) -> tuple[Array, dict[str, Array]]:
    return _walk(options, False, hidden_BSD, head_DV, targets_BS, loss_weight_BS)[0]


def _forward(
    options: _Options, hidden_BSD: Array, head_DV: Array, targets_BS: Array, loss_weight_BS: Array
) -> tuple[Any, Any]:
    return _walk(options, True, hidden_BSD, head_DV, targets_BS, loss_weight_BS)


def _backward(
    options: _Options, gradients: tuple[Array, Array, Array], cotangents: tuple[Array, Any]
) -> tuple[Any, ...]:
    del options
    scale, _ = cotangents
    hidden, head, weight = ((gradient * scale).astype(gradient.dtype) for gradient in gradients)
    return hidden, head, None, weight


_total.defvjp(_forward, _backward)


def _head_axes(options: _Options) -> tuple[str, str]:
    return ("vocab", "embed") if options.tied else ("embed", "vocab")


def _hidden_spec(options: _Options) -> P:
    return axes.spec("act_batch", "act_residual_sequence" if options.sequence_sharded else "act_sequence", None)


def _walk(
    options: _Options, differentiate: bool, hidden_BSD: Array, head_DV: Array, targets_BS: Array, loss_weight_BS: Array
) -> tuple[tuple[Array, dict[str, Array]], tuple[Array, ...]]:
    """Sum and metrics, and the gradients of the sum by (hidden, head, loss_weight) if they are wanted."""
    weight_spec, sum_spec = axes.spec("act_batch", "act_sequence"), P()
    # Every token meets every shard of the vocabulary: a sequence sharded over tensor is gathered here.
    hidden_BSD = jax.reshard(hidden_BSD, P(*weight_spec, None))
    head_spec = axes.spec(*_head_axes(options))
    gradient_specs = (
        _hidden_spec(options),
        head_spec,
        weight_spec,
    )
    region = jax.shard_map(
        functools.partial(_local, options, differentiate),
        in_specs=(P(*weight_spec, None), head_spec, weight_spec, weight_spec),
        out_specs=(
            (sum_spec, {"loss": sum_spec, "z_loss": sum_spec, "weight": sum_spec}),
            gradient_specs if differentiate else (),
        ),
        axis_names=axes.automatic(),
        check_vma=False,  # it would ask for the sums over axes of one device that _sum_over leaves out
    )
    return region(hidden_BSD, head_DV, targets_BS, loss_weight_BS)


def _local(
    options: _Options,
    differentiate: bool,
    hidden_BSD: Array,
    stored_head: Array,
    targets_BS: Array,
    loss_weight_BS: Array,
) -> tuple[tuple[Array, dict[str, Array]], tuple[Array, ...]]:
    """One device's tokens against its share of the vocabulary; every collective of the loss is in here."""
    B, S, _ = hidden_BSD.shape
    vocabulary_dim = _head_axes(options).index("vocab")
    groups = head_groups(B * S, stored_head.shape[vocabulary_dim], jax.lax.axis_size(AXIS), options.most_members)
    head = _to_vocabulary(groups, vocabulary_dim, stored_head.astype(options.compute_dtype))
    count, C = chunk_size(B * S, head.shape[vocabulary_dim] * groups.count, options.chunk)

    def split(x: Array) -> Array:
        """(B, S, ...) -> (chunks, C, ...), padded with zeros, which have weight 0."""
        flat = x.reshape(B * S, *x.shape[2:])
        padding = ((0, count * C - B * S), *((0, 0),) * (flat.ndim - 1))
        return jnp.pad(flat, padding).reshape(count, C, *flat.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(count * C, *x.shape[2:])[: B * S].reshape(B, S, *x.shape[2:])

    def of_group(x: Array) -> Array:
        """(chunks, C) -> (chunks, N). Little enough to bring together before the walk."""
        return jnp.moveaxis(groups.all_gather(x), 0, 1).reshape(count, -1)

    def step(sums: tuple[Array, ...], part: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        added, outputs = _chunk(options, groups, differentiate, head, *part)
        return jax.tree.map(jnp.add, sums, added), outputs

    start: tuple[Array, ...] = (jnp.zeros(3),)
    if differentiate:
        start += (jnp.zeros(head.shape),)
    targets, weights = split(targets_BS), split(loss_weight_BS)
    chunks = (split(hidden_BSD.astype(options.compute_dtype)), of_group(targets), of_group(weights), weights)
    sums, outputs = jax.lax.scan(step, start, chunks)

    loss, z_loss, weight = _sum_over(sums[0], *options.token_axes)
    result = loss + z_loss, {"loss": loss, "z_loss": z_loss, "weight": weight}
    if not differentiate:
        return result, ()
    hidden_gradient = join(outputs[1]).astype(hidden_BSD.dtype)
    if options.sequence_sharded:
        hidden_gradient = _scatter_over(hidden_gradient, "tensor", dim=1)
    else:
        hidden_gradient = _sum_over(hidden_gradient, "tensor")
    # Scattered over fsdp first: the sum over the other axes then moves only the shard that this device keeps.
    head_gradient = _to_width(groups, vocabulary_dim, sums[1].astype(options.reduce_dtype))
    head_gradient = _sum_over(head_gradient, *(axis for axis in options.token_axes if axis != AXIS))
    return result, (hidden_gradient, head_gradient.astype(stored_head.dtype), join(outputs[0]))


def _to_vocabulary(groups: Groups, vocabulary_dim: int, stored: Array) -> Array:
    """A stored head, some of the width's columns -> all of them, for the member's part of the vocabulary."""
    width_dim, G, R = 1 - vocabulary_dim, groups.count, groups.between
    if G == 1:
        return groups.gather_between(stored, dim=width_dim)
    parts_GVD = _canonical(stored, vocabulary_dim).reshape(G, stored.shape[vocabulary_dim] // G, -1)
    parts_GVD = groups.all_to_all(parts_GVD)  # of the width now, not of the vocabulary
    parts_VGD = groups.gather_between(jnp.moveaxis(parts_GVD, 0, 1), dim=2)
    return _canonical(parts_VGD.reshape(parts_VGD.shape[0], stored.shape[width_dim] * G * R), vocabulary_dim)


def _to_width(groups: Groups, vocabulary_dim: int, gradient: Array) -> Array:
    """The way back: sums over the devices of `fsdp` the gradient of such a part, and cuts it as the head is stored."""
    if groups.count == 1:
        return groups.scatter_between(gradient, dim=1 - vocabulary_dim)
    whole_VD = _canonical(gradient, vocabulary_dim)
    parts_VGD = groups.scatter_between(whole_VD.reshape(whole_VD.shape[0], groups.count, -1), dim=2)
    parts_GVD = groups.all_to_all(jnp.moveaxis(parts_VGD, 1, 0))
    return _canonical(parts_GVD.reshape(-1, parts_GVD.shape[2]), vocabulary_dim)


def _canonical(head: Array, vocabulary_dim: int) -> Array:
    """(V, D) of a head that may be (D, V), and back."""
    return head if vocabulary_dim == 0 else head.T


def _chunk(
    options: _Options,
    groups: Groups,
    differentiate: bool,
    head: Array,
    hidden_CD: Array,
    targets_N: Array,
    weight_N: Array,
    weight_C: Array,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """What a chunk adds up: (loss, z_loss, weight) and its head gradient; and per token: loss and hidden gradient.

    The logits are those of the group's N tokens; what is returned per token, and counted, is of this device's own.
    """
    table, vocabulary_dim = ("VD", 0) if options.tied else ("DV", 1)
    C, D = hidden_CD.shape
    hidden_ND = groups.all_gather(hidden_CD).reshape(-1, D)
    logits_NV = jnp.einsum(f"ND,{table}->NV", hidden_ND, head, preferred_element_type=jnp.float32)
    if options.softcap:
        logits_NV = options.softcap * jnp.tanh(logits_NV / options.softcap)
    # A comparison instead of an index: the target's logit is on one of the devices that share the vocabulary.
    V = head.shape[vocabulary_dim]
    first = (jax.lax.axis_index("tensor") * groups.count + groups.member()) * V
    is_target_NV = jnp.arange(V)[None, :] == (targets_N - first)[:, None]

    largest_N = groups.largest(jnp.max(logits_NV, axis=1))
    if _present("tensor"):
        largest_N = jax.lax.pmax(largest_N, "tensor")
    exp_NV = jnp.exp(logits_NV - largest_N[:, None])
    target_logit_N = jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=1)
    shares = jnp.stack([jnp.sum(exp_NV, axis=1), target_logit_N])
    denominator_N, target_logit_N = _sum_over(groups.sum(shares), "tensor")
    log_z_N = largest_N + jnp.log(denominator_N)

    def own(x_N: Array) -> Array:
        return x_N if groups.count == 1 else jax.lax.dynamic_slice_in_dim(x_N, groups.member() * C, C)

    loss_C = own(log_z_N - target_logit_N)
    z_loss_C = own(options.z_loss * log_z_N**2)
    sums = jnp.stack([jnp.sum(weight_C * loss_C), jnp.sum(weight_C * z_loss_C), jnp.sum(weight_C)])
    if not differentiate:
        return (sums,), ()

    # d(loss + z_loss) / d logit = p * (1 + 2 * z_loss * log Z) - [target], times the soft-cap's slope.
    probability_scale_N = (1.0 + 2.0 * options.z_loss * log_z_N) / denominator_N
    slope_NV = weight_N[:, None] * (exp_NV * probability_scale_N[:, None] - is_target_NV)
    if options.softcap:
        slope_NV = slope_NV * (1.0 - (logits_NV / options.softcap) ** 2)
    slope_NV = slope_NV.astype(options.compute_dtype)
    hidden_gradient = jnp.einsum(f"NV,{table}->ND", slope_NV, head)
    hidden_gradient = groups.reduce_scatter(hidden_gradient.reshape(groups.count, C, D))
    head_gradient = jnp.einsum(f"ND,NV->{table}", hidden_ND, slope_NV, preferred_element_type=jnp.float32)
    return (sums, head_gradient), (loss_C + z_loss_C, hidden_gradient)


def _present(*names: str) -> tuple[str, ...]:
    """Those axes that have more than one device: XLA keeps a collective over a single one, and it costs time."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in names if sizes[name] > 1)


def _sum_over(x: Array, *names: str) -> Array:
    present = _present(*names)
    return jax.lax.psum(x, present) if present else x


def _scatter_over(x: Array, name: str, dim: int) -> Array:
    """Sum over an axis, of which each device keeps its part of a dim."""
    return jax.lax.psum_scatter(x, name, scatter_dimension=dim, tiled=True) if _present(name) else x
