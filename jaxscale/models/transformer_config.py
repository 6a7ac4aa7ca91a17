"""Shape of a Llama-family transformer. Cheap to import: recipes use it. Read next: `models/transformer.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxscale.config import Config, ConfigError, ModelConfig
from jaxscale.models.experts_config import ExpertsConfig
from jaxscale.models.rope_config import RopeConfig

if TYPE_CHECKING:
    from jaxscale.task import Task


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """RMSNorm, rotary positions, grouped-query attention, gated MLP; all layers alike, stacked and scanned."""

    vocabulary: int = 512
    """Token ids that it knows: those of the tokenizer, or more."""
    layers: int = 4
    """Blocks of attention and MLP."""
    width: int = 256
    """Size of the residual stream."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int = 0
    """Key/value heads; 0 = as many as heads."""
    head_dim: int = 0
    """Size of a head; 0 = width / heads."""
    mlp: int = 1024
    """Hidden units of the MLP."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    tied: bool = False
    """The head is the embedding table."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    logit_softcap: float = 0.0
    """Output logits become cap * tanh(logits / cap); 0 = off."""
    attention_softcap: float = 0.0
    """The same for attention scores."""
    window: tuple[int, ...] = ()
    """Tokens back that the layers see, in turn: `1024 0` = 1,024, then all, then 1,024 ...; none given = all."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm_epsilon: float = 1e-5
    """Added to the mean square that a norm divides by the root of."""
    dropout: float = 0.0
    """Share of the residual updates zeroed in training."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Attention kernel; auto = splash on TPU, cuDNN on GPU, XLA elsewhere."""
    context: Literal["auto", "gather", "ring", "ulysses"] = "auto"
    """How attention works over mesh.context: gather keys, pass them round (ring), or exchange heads (ulysses)."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "width", "heads", "mlp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("kv_heads", "head_dim", "logit_softcap", "attention_softcap", "norm_epsilon"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name.replace('_', '-')} is {getattr(self, name)}; use 0 or more")
        if not self.head_dim and self.width % self.heads:
            raise ConfigError(
                f"model.width {self.width} is not a multiple of model.heads {self.heads}; "
                "change one or set model.head-dim"
            )
        if self.heads % self.key_heads:
            raise ConfigError(f"model.heads {self.heads} is not a multiple of model.kv-heads {self.key_heads}")
        if self.dim_per_head % 2:
            raise ConfigError(f"the head dim is {self.dim_per_head}; rotary positions need an even one")
        if self.window and self.layers % len(self.window):
            raise ConfigError(
                f"model.window has {len(self.window)} entries, which do not divide model.layers {self.layers}"
            )
        if min(self.window, default=0) < 0:
            raise ConfigError(f"model.window is {self.window}; use positive sizes, or 0 for no window")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout is {self.dropout}; it is a share, in [0, 1)")

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def expert_hidden(self) -> int:
        return self.experts.hidden or self.mlp

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.width // self.heads

    def check(self, config: Config, platform: str) -> None:
        import contextlib

        import jax

        from jaxscale.ops import attention
        from jaxscale.parallel import context
        from jaxscale.parallel.division import divide
        from jaxscale.parallel.pipeline import stages

        sizes = jax.sharding.get_abstract_mesh().shape
        ragged = self.experts.dispatch == "ragged" or (self.experts.dispatch == "auto" and platform == "tpu")
        if config.precision.matmul != "compute" and self.experts.count and ragged and self.experts.capacity is None:
            raise ConfigError(
                f"precision.matmul {config.precision.matmul} multiplies whole blocks, and ragged experts have none; "
                "set model.experts.dispatch to dense (or a capacity), or precision.matmul to compute"
            )
        period = len(self.window) or 1
        chunk_layers: tuple[int, ...] = ()
        with contextlib.suppress(ConfigError):  # the audit says it, with all else that it finds
            chunk_layers = divide(self.layers, stages(), config.pipeline).sizes
        if any(count % period for count in chunk_layers):
            raise ConfigError(
                f"model.window repeats every {period} layers, and {len(chunk_layers)} pipeline chunks have "
                f"{' '.join(map(str, chunk_layers))} layers; use fewer stages (mesh.stage) or chunks "
                f"(pipeline.chunks), or multiples of {period} in pipeline.layers"
            )
        for length in (config.data.sequence, *(phase.sequence for phase in config.phases if phase.sequence)):
            form: context.Form | None = None
            if context.size() > 1:
                with contextlib.suppress(context.UnsupportedContext):  # the audit says it, with all else that it finds
                    form = context.choose(self.context, sizes, length=length, heads=self.heads, kv_heads=self.key_heads)
            attention.check(
                self.attention,
                platform=platform,
                length=length,
                head_dim=self.dim_per_head,
                dtype=config.precision.compute,
                softcap=self.attention_softcap,
                packed=True,
                form=form,
            )

    def task(self, config: Config) -> Task:
        from jaxscale import remat
        from jaxscale.models.transformer import TransformerTask

        remat.check(config.remat)
        return TransformerTask(self, config.precision, config.remat, config.train, config.pipeline)
