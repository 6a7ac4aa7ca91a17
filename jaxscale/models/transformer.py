"""The Llama-family transformer as pure functions over one nested dict of parameters.

Legend: B batch rows, S sequence, D width, V vocabulary, L layers.

    embed/table (V, D)   layers/<block>/<name> (L, ...)   norm/scale (D,)   head/weight (D, V) unless tied

The layers are stacked and scanned; every dim's logical axis is in the parameter table, so any mesh follows from the
rules. Between blocks activations are `B@(data,fsdp,expert), S@(context,tensor), D`. Read next: `train/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxscale import axes, precision, remat, rng
from jaxscale.checkpoint.stored_layout import StoredLayout
from jaxscale.config import PipelineConfig, PrecisionConfig, RematConfig, TrainConfig
from jaxscale.layers.attention import Attend, RopeTables, attention_layer, attention_parameters
from jaxscale.layers.embed import TABLE, embed
from jaxscale.layers.mlp import mlp, mlp_parameters
from jaxscale.layers.moe import Tokens, moe, moe_parameters, tokens_of
from jaxscale.layers.norm import rms_norm
from jaxscale.layers.rope import rope_tables
from jaxscale.layers.router import no_sums
from jaxscale.models.transformer_config import TransformerConfig
from jaxscale.ops.attention import attention
from jaxscale.ops.cross_entropy import cross_entropy
from jaxscale.parallel import context
from jaxscale.parallel.division import Division, divide
from jaxscale.parallel.layer_layout import layer_layout, stored_spec
from jaxscale.parallel.microbatches import split
from jaxscale.parallel.pipeline import forward_loss, stages
from jaxscale.parallel.zero import shard_of
from jaxscale.task import NOTHING, PER_LAYER, Batch, LayerSums, Parameter, Params
from jaxscale.tree import flatten, unflatten


@dataclass(frozen=True)
class TransformerTask:
    """Next-token prediction; implements `task.Task`."""

    model: TransformerConfig
    precision_config: PrecisionConfig
    remat_config: RematConfig
    train: TrainConfig
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    @property
    def precision(self) -> precision.Precision:
        return precision.resolve(self.precision_config)

    @property
    def vocabulary(self) -> int:
        return self.model.vocabulary

    @property
    def tables(self) -> None:
        """None: the embedding is a dense weight."""
        return None

    @property
    def stored_layout(self) -> StoredLayout | None:
        """Programs have the layers as checkpoints do, but for pipeline stages of several or of unequal chunks."""
        return layer_layout(self.division)

    @property
    def division(self) -> Division:
        """The layers of each chunk on the current mesh. Raises ConfigError."""
        return divide(self.model.layers, stages(), self.pipeline)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The model's own, whatever padding a program has beside them."""
        model = self.model
        layer = {
            "attention_norm": {"scale": Parameter((model.width,), ("norm",), init="ones")},
            "attention": attention_parameters(
                model.width, model.heads, model.key_heads, model.dim_per_head, model.layers, model.qk_norm
            ),
            "mlp_norm": {"scale": Parameter((model.width,), ("norm",), init="ones")},
        }
        if model.experts.count:
            layer |= moe_parameters(model.width, model.expert_hidden, model.layers, model.experts)
        else:
            layer["mlp"] = mlp_parameters(model.width, model.mlp, model.layers)
        table: dict[str, Any] = {
            "embed": {"table": Parameter((model.vocabulary, model.width), TABLE, scale=model.width**-0.5)},
            "layers": {
                block: {name: _stack(parameter, model.layers) for name, parameter in parameters.items()}
                for block, parameters in layer.items()
            },
            "norm": {"scale": Parameter((model.width,), ("norm",), init="ones")},
        }
        if not model.tied:
            table["head"] = {
                "weight": Parameter((model.width, model.vocabulary), ("embed", "vocab"), scale=model.width**-0.5)
            }
        return flatten(table)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters in `precision.weights`, each from a key of its own path; equal bit for bit on every mesh."""
        params = unflatten({path: self._init(p, rng.named_key(key, path)) for path, p in self.parameters.items()})
        layout = self.stored_layout
        return layout.restore(params) if layout is not None else params

    def _init(self, parameter: Parameter, key: jax.Array) -> jax.Array:
        # As checkpoints have it: the model's layers, whose values no padding changes.
        spec = stored_spec(parameter.shape, axes.spec(*parameter.axes), jax.sharding.get_abstract_mesh().shape)
        if parameter.init == "normal":
            values = jax.random.normal(key, parameter.shape, jnp.float32, out_sharding=spec) * parameter.scale
        else:
            values = jnp.full(parameter.shape, float(parameter.init == "ones"), jnp.float32, out_sharding=spec)
        return values if parameter.sign_step else values.astype(self.precision.weights)

    def loss(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted sums over the tokens: the differentiated loss (cross-entropy and z-loss) and metrics.

        batch: tokens, targets, segment_ids, positions int32 and loss_weight float32, all (B, S); row (B,).
        """
        batch = self.arrange(batch)
        if stages() > 1:
            return forward_loss(self, params, split(batch, self.train.microbatches), key)
        x_BSD, added = self.through(params["layers"], self.begin(params, batch), batch, key)
        total, metrics = self.end(params, x_BSD, batch)
        return total if added.loss is None else total + added.loss, metrics | added.metrics

    def arrange(self, batch: Batch) -> Batch:
        """The batch with the positions of its rows in the order that the layers work in: see `parallel/context.py`."""
        if not self._balanced(batch["tokens"].shape[-1]):
            return batch
        return {**context.arrange({name: batch[name] for name in batch if name != "row"}), "row": batch["row"]}

    def _balanced(self, length: int) -> bool:
        model = self.model
        return context.is_balanced(model.context, length=length, heads=model.heads, kv_heads=model.key_heads)

    def begin(self, params: Params, batch: Batch) -> jax.Array:
        """The embedded tokens, (B, S, D) in the compute dtype."""
        return embed(self.precision, shard_of(params["embed"]["table"]), batch["tokens"])

    def end(self, params: Params, x_BSD: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of what the last layer gives, as `loss` returns it."""
        total, sums = cross_entropy(
            self.normed(params, x_BSD),
            self.head(params),
            batch["targets"],
            batch["loss_weight"],
            z_loss=self.train.z_loss,
            softcap=self.model.logit_softcap,
            chunk=self.train.loss_chunk,
            compute_dtype=self.precision.compute,
            reduce_dtype=self.precision.reduce,
            tied=self.model.tied,
        )
        return total, {name: sums[name] for name in ("loss", *(("z_loss",) if self.train.z_loss else ()))}

    def normed(self, params: Params, x_BSD: jax.Array) -> jax.Array:
        """The last norm."""
        return rms_norm(x_BSD, params["norm"]["scale"], self.model.norm_epsilon)

    def head(self, params: Params) -> jax.Array:
        """The head's weight (D, V), or the embedding table (V, D) when tied."""
        return shard_of(params["embed"]["table"] if self.model.tied else params["head"]["weight"])

    def hidden(self, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
        """The residual stream after the last norm, (B, S, D) in the compute dtype. No key: no dropout."""
        batch = self.arrange(batch)
        x_BSD, _ = self.through(params["layers"], self.begin(params, batch), batch, key)
        x_BSD = self.normed(params, x_BSD)
        return context.restore(x_BSD) if self._balanced(x_BSD.shape[1]) else x_BSD

    def through(
        self, layers: Params, x_BSD: jax.Array, batch: Batch, key: jax.Array | None, first: jax.Array | int = 0
    ) -> tuple[jax.Array, LayerSums]:
        """The residual stream behind `layers`, which are layers `first` and following of the model, and their sums.

        Stream and batch have the order of `arrange`.
        """
        model = self.model
        dropout_key = key if model.dropout else None
        # Where attention needs those of whole rows, they are gathered once for all layers.
        positions = "act_sequence" if self._balanced(x_BSD.shape[1]) else "act_attended_sequence"
        segment_ids_BS = jax.reshard(batch["segment_ids"], axes.spec("act_batch", positions))

        def attend(window: int) -> Attend:
            return partial(
                attention,
                segment_ids_BS=segment_ids_BS,
                window=window,
                softcap=model.attention_softcap,
                implementation=model.attention,
                context=model.context,
            )

        def step(
            carry: tuple[jax.Array, LayerSums], weights: Params, index: jax.Array, window: int
        ) -> tuple[jax.Array, LayerSums]:
            x_BSD, sums = carry
            layer = remat.apply(self.remat_config, partial(self.layer, attend=attend(window), tokens=tokens))
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, first + index)
            x_BSD, own = layer(x_BSD, weights, tables, batch["row"], key)
            return x_BSD, _add_layer(sums, own, index)

        tables = rope_tables(batch["positions"], model.dim_per_head, model.rope)
        tokens, none = None, NOTHING
        if model.experts.count:
            tokens = tokens_of(batch["segment_ids"], batch["loss_weight"])
            none = no_sums(model.experts, jax.tree.leaves(layers)[0].shape[0])
        return self.scan_layers(layers, step, (x_BSD, none))

    def scan_layers[Carry](
        self, stacked: Params, step: Callable[[Carry, Params, jax.Array, int], Carry], carry: Carry
    ) -> Carry:
        """Folds `step(carry, weights of one layer, index of the layer, its window)` over the layers.

        stacked: `params["layers"]`. Training and generation walk the layers through this one function.
        """
        windows = self.model.window or (0,)
        period = len(windows)  # layers with different windows are unrolled inside one scan step: windows stay static

        def body(carry_and_group: tuple[Carry, jax.Array], weights: Params) -> tuple[tuple[Carry, jax.Array], None]:
            carry, group = carry_and_group
            for offset, window in enumerate(windows):
                one = jax.tree.map(lambda w, offset=offset: w[offset], weights) if period > 1 else weights
                carry = step(carry, one, group * period + offset, window)
            return (carry, group + 1), None

        stacked = self._on_each_stage(stacked)
        if period > 1:
            stacked = jax.tree.map(lambda w: _group(w, period), stacked)
        (carry, _), _ = jax.lax.scan(body, (carry, jnp.int32(0)), stacked)
        return carry

    def _on_each_stage(self, stacked: Params) -> Params:
        """All layers on every stage, in the model's order: what a scan wants, and generation. Training's stages have
        their own layers at hand, and where there is one stage nothing moves.
        """
        if all(jax.typeof(w).sharding.spec[0] is None for w in jax.tree.leaves(stacked)):
            return stacked
        layout, own = self.stored_layout, stacked
        if layout is not None:
            stacked = layout.store({"layers": stacked})["layers"]
        return jax.tree.map(lambda w, o: jax.reshard(w, jax.P(None, *jax.typeof(o).sharding.spec[1:])), stacked, own)

    def layer(
        self,
        x_BSD: jax.Array,
        weights: Mapping[str, Mapping[str, jax.Array]],
        tables: RopeTables,
        row_B: jax.Array,
        dropout_key: jax.Array | None,
        attend: Attend,
        tokens: Tokens | None = None,
    ) -> tuple[jax.Array, LayerSums]:
        """One block: x + attention(norm(x)), then x + mlp(norm(x)) or x + moe(norm(x)), and what it adds to the sums.

        row_B is read where there is a dropout key; tokens by experts, None in generation.
        """
        model = self.model

        def drop(update_BSD: jax.Array, branch: int) -> jax.Array:
            if dropout_key is None:
                return update_BSD
            length = update_BSD.shape[1]
            order = context.order(length, context.size()) if self._balanced(length) else None
            return rng.dropout(update_BSD, model.dropout, jax.random.fold_in(dropout_key, branch), row_B, order)

        x_BSD = checkpoint_name(x_BSD, "layer_input")
        normed_BSD = rms_norm(x_BSD, weights["attention_norm"]["scale"], model.norm_epsilon)
        mixed_BSD = attention_layer(
            normed_BSD, weights["attention"], tables, attend, model.norm_epsilon, self.precision
        )
        x_BSD = x_BSD + drop(mixed_BSD, 0)
        normed_BSD = rms_norm(x_BSD, weights["mlp_norm"]["scale"], model.norm_epsilon)
        if "mlp" in weights:
            update_BSD, sums = mlp(normed_BSD, weights["mlp"], self.precision), NOTHING
        else:
            update_BSD, sums = moe(normed_BSD, weights, model.experts, self.precision, tokens, model.layers)
        return x_BSD + drop(update_BSD, 1), sums

    def flops_per_token(self, sequence: int) -> float:
        """6 FLOPs per matmul weight and token, plus causal attention: 12 H K FLOPs per attended position and layer.

        A matmul of N weights costs 2N forward and 4N backward per token; scores and mixing cost 2 * 2 H K forward per
        attended position. A token attends to (S + 1) / 2 positions on average, fewer under a window. The embedding
        lookup costs nothing, recomputation is not counted (Chowdhery et al. 2022, "PaLM", appendix B, made causal).
        Of experts those that a token goes to count.
        """
        model = self.model
        used = [
            _size(p.shape) * model.experts.top_k // model.experts.count if "experts" in p.axes else _size(p.shape)
            for path, p in self.parameters.items()
            if len(p.shape) > 1 and "norm" not in path and not p.sign_step
        ]
        lookup_only = 0 if model.tied else model.vocabulary * model.width
        windows = model.window or (0,)
        attended = sum(_mean_attended(sequence, window) for window in windows) / len(windows) * model.layers
        return 6.0 * (sum(used) - lookup_only) + 12.0 * model.heads * model.dim_per_head * attended


def _add_layer(sums: LayerSums, own: LayerSums, index: jax.Array) -> LayerSums:
    """The sums with those of layer `index` of the scanned ones."""
    metrics = {
        name: value.at[index].set(own.metrics[name]) if name.startswith(PER_LAYER) else value + own.metrics[name]
        for name, value in sums.metrics.items()
    }
    return LayerSums(None if sums.loss is None or own.loss is None else sums.loss + own.loss, metrics)


def _stack(parameter: Parameter, layers: int) -> Parameter:
    return replace(parameter, shape=(layers, *parameter.shape), axes=("layers", *parameter.axes))


def _group(stacked: jax.Array, period: int) -> jax.Array:
    spec = jax.typeof(stacked).sharding.spec
    shape = (stacked.shape[0] // period, period, *stacked.shape[1:])
    return jax.lax.reshape(stacked, shape, out_sharding=jax.P(spec[0], None, *spec[1:]))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _mean_attended(sequence: int, window: int) -> float:
    """Mean over the positions of a row of how many positions each attends to, itself included."""
    if not window or window >= sequence:
        return (sequence + 1) / 2
    return (window * (window + 1) / 2 + (sequence - window) * window) / sequence
