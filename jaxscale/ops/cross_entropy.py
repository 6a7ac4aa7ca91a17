"""Cross-entropy of a language-model head that never holds the float32 logits of all tokens.

Tokens are walked in chunks; when differentiated, the gradients are computed in the same walk, so that each chunk's
logits exist once. The vocabulary stays sharded over `tensor`. Read next: `models/transformer.py`, which calls it.

Shapes: B rows, S positions, D model width, V vocabulary; inside the manual region those of one device, and
N = B * S tokens in C-token chunks.
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
    options = _Options(z_loss, softcap, chunk, compute_dtype, reduce_dtype, tied, sequence_sharded)
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
    """(number of chunks, tokens per chunk) for one device's tokens and share of the vocabulary; chunks are even."""
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
    head = jax.reshard(head_DV.astype(options.compute_dtype), axes.gathered_spec(_head_axes(options)))
    gradient_specs = (
        _hidden_spec(options),
        axes.spec(*_head_axes(options)),
        weight_spec,
    )
    region = jax.shard_map(
        functools.partial(_local, options, differentiate, head_DV.dtype),
        in_specs=(P(*weight_spec, None), axes.gathered_spec(_head_axes(options)), weight_spec, weight_spec),
        out_specs=(
            (sum_spec, {"loss": sum_spec, "z_loss": sum_spec, "weight": sum_spec}),
            gradient_specs if differentiate else (),
        ),
        axis_names=axes.automatic(),
        check_vma=False,  # it would ask for the sums over axes of one device that _sum_over leaves out
    )
    return region(hidden_BSD, head, targets_BS, loss_weight_BS)


def _local(
    options: _Options,
    differentiate: bool,
    gradient_dtype: DTypeLike,
    hidden_BSD: Array,
    head: Array,
    targets_BS: Array,
    loss_weight_BS: Array,
) -> tuple[tuple[Array, dict[str, Array]], tuple[Array, ...]]:
    """One device's tokens against its share of the vocabulary; every collective of the loss is in this function."""
    B, S, _ = hidden_BSD.shape
    V = head.shape[0 if options.tied else 1]
    count, C = chunk_size(B * S, V, options.chunk)

    def split(x: Array) -> Array:
        """(B, S, ...) -> (chunks, C, ...), padded with zeros, which have weight 0."""
        flat = x.reshape(B * S, *x.shape[2:])
        padding = ((0, count * C - B * S), *((0, 0),) * (flat.ndim - 1))
        return jnp.pad(flat, padding).reshape(count, C, *flat.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(count * C, *x.shape[2:])[: B * S].reshape(B, S, *x.shape[2:])

    def step(sums: tuple[Array, ...], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        added, outputs = _chunk(options, differentiate, head, *part)
        return jax.tree.map(jnp.add, sums, added), outputs

    start: tuple[Array, ...] = (jnp.zeros(3),)
    if differentiate:
        start += (jnp.zeros(head.shape),)
    chunks = (split(hidden_BSD.astype(options.compute_dtype)), split(targets_BS), split(loss_weight_BS))
    sums, outputs = jax.lax.scan(step, start, chunks)

    loss, z_loss, weight = _sum_over(sums[0], *TOKEN_AXES)
    result = loss + z_loss, {"loss": loss, "z_loss": z_loss, "weight": weight}
    if not differentiate:
        return result, ()
    hidden_gradient = join(outputs[1]).astype(hidden_BSD.dtype)
    if options.sequence_sharded:
        hidden_gradient = _scatter_over(hidden_gradient, "tensor", dim=1)
    else:
        hidden_gradient = _sum_over(hidden_gradient, "tensor")
    # Scattered over fsdp first: the sum over the other axes then moves only the shard that this device keeps.
    head_gradient = sums[1].astype(options.reduce_dtype)
    head_gradient = _scatter_over(head_gradient, "fsdp", dim=_head_axes(options).index("embed"))
    head_gradient = _sum_over(head_gradient, *(axis for axis in TOKEN_AXES if axis != "fsdp"))
    return result, (hidden_gradient, head_gradient.astype(gradient_dtype), join(outputs[0]))


def _chunk(
    options: _Options, differentiate: bool, head: Array, hidden_CD: Array, targets_C: Array, weight_C: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """What a chunk adds up: (loss, z_loss, weight) and its head gradient; and per token: loss and hidden gradient."""
    table = "VD" if options.tied else "DV"
    logits_CV = jnp.einsum(f"CD,{table}->CV", hidden_CD, head, preferred_element_type=jnp.float32)
    if options.softcap:
        logits_CV = options.softcap * jnp.tanh(logits_CV / options.softcap)
    V = logits_CV.shape[1]
    # A comparison instead of an index: the target's logit is on one of the devices that share the vocabulary.
    local_target_C = targets_C - jax.lax.axis_index("tensor") * V
    is_target_CV = jnp.arange(V)[None, :] == local_target_C[:, None]

    largest_C = jnp.max(logits_CV, axis=1)
    if _present("tensor"):
        largest_C = jax.lax.pmax(largest_C, "tensor")
    exp_CV = jnp.exp(logits_CV - largest_C[:, None])
    target_logit_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=1)
    denominator_C, target_logit_C = _sum_over(jnp.stack([jnp.sum(exp_CV, axis=1), target_logit_C]), "tensor")
    log_z_C = largest_C + jnp.log(denominator_C)
    loss_C, z_loss_C = log_z_C - target_logit_C, options.z_loss * log_z_C**2
    sums = jnp.stack([jnp.sum(weight_C * loss_C), jnp.sum(weight_C * z_loss_C), jnp.sum(weight_C)])
    if not differentiate:
        return (sums,), ()

    # d(loss + z_loss) / d logit = p * (1 + 2 * z_loss * log Z) - [target], times the soft-cap's slope.
    probability_scale_C = (1.0 + 2.0 * options.z_loss * log_z_C) / denominator_C
    slope_CV = weight_C[:, None] * (exp_CV * probability_scale_C[:, None] - is_target_CV)
    if options.softcap:
        slope_CV = slope_CV * (1.0 - (logits_CV / options.softcap) ** 2)
    slope_CV = slope_CV.astype(options.compute_dtype)
    hidden_gradient = jnp.einsum(f"CV,{table}->CD", slope_CV, head)
    head_gradient = jnp.einsum(f"CD,CV->{table}", hidden_CD, slope_CV, preferred_element_type=jnp.float32)
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
