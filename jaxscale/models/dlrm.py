"""The deep learning recommendation model (Naumov et al. 2019, "DLRM") as a task: the chance that an example is clicked.

    bottom/N/weight, bias   MLP on the dense features, out comes a vector like an embedding
    tables/...              embedding tables: their bags, one vector of each feature, see parallel/table.py
    top/N/weight, bias      MLP on that vector and the dot products of all pairs of vectors

Weights of the MLPs are stored over `fsdp`; activations are split by rows, the vectors' width also over `tensor`.
Legend: B rows, F features and the dense one, D width. Read next: `train/tables.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxscale import axes, precision, rng
from jaxscale.config import PrecisionConfig
from jaxscale.layers.linear import Projection, project
from jaxscale.models.dlrm_config import DlrmConfig
from jaxscale.ops.auc import histograms
from jaxscale.optim.sparse import SparseRule
from jaxscale.parallel.table import make_groups
from jaxscale.parallel.table_layout import Bags, Feature
from jaxscale.task import Batch, Parameter, Params
from jaxscale.train.tables import TABLES, Tables, with_bags
from jaxscale.tree import unflatten

ROWS = P(axes.BATCH_AXES, None)


@dataclass(frozen=True)
class DlrmTask:
    """Binary cross-entropy of clicks; implements `task.Task`."""

    model: DlrmConfig
    precision_config: PrecisionConfig

    @property
    def precision(self) -> precision.Precision:
        return precision.resolve(self.precision_config)

    @property
    def vocabulary(self) -> int:
        return sum(self.model.tables)

    @property
    def stored_layout(self) -> None:
        """None: no layout of tables depends on the mesh."""
        return None

    @property
    def tables(self) -> Tables:
        model = self.model
        features = (Feature(rows, hots) for rows, hots in zip(model.tables, model.bags, strict=True))
        groups, order = make_groups(
            model.placements,
            Bags(tuple(features)),
            width=model.width,
            pooling=model.pooling,
            bins=model.bins,
            factor=model.exchange,
            compute=self.precision.compute,
        )
        rule = SparseRule(model.table_optimizer, model.table_epsilon)
        return Tables(groups, order, rule, model.table_learning_rate)

    @property
    def parameters(self) -> dict[str, Parameter]:
        return {
            **_mlp_parameters("bottom", self._bottom),
            **_mlp_parameters("top", self._top),
            **self.tables.parameters,
        }

    @property
    def _bottom(self) -> tuple[int, ...]:
        return (self.model.dense, *self.model.bottom, self.model.width)

    @property
    def _top(self) -> tuple[int, ...]:
        vectors = len(self.model.tables) + 1
        return (self.model.width + vectors * (vectors - 1) // 2, *self.model.top, 1)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, each from a key of its own path; tables under `tables`. Equal bits on every mesh."""
        made = {}
        for path, parameter in self.parameters.items():
            spec = axes.spec(*parameter.axes)
            if parameter.init == "normal":
                values = jax.random.normal(rng.named_key(key, path), parameter.shape, jnp.float32, out_sharding=spec)
                made[path] = (values * parameter.scale).astype(self.precision.weights)
            else:
                made[path] = jnp.zeros(parameter.shape, self.precision.weights, out_sharding=spec)
        return unflatten(made)

    def loss(self, params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Sums over the examples: cross-entropy, predicted chances, labels; without a key also `histograms` of logits.

        batch: dense (B, number) float32, ids (B, H) int32, label and loss_weight (B,) float32; with bags that were
        looked up (training), or else params has the tables.
        """
        if TABLES in params:
            batch = with_bags(batch, self.tables.look_up(params[TABLES], batch["ids"])[0])
        logit_B, label_B, weight_B = self.logits(params, batch), batch["label"], batch["loss_weight"]
        # log(1 + e^z) - z y, without an e^z that overflows.
        each_B = jnp.maximum(logit_B, 0) - logit_B * label_B + jnp.log1p(jnp.exp(-jnp.abs(logit_B)))
        total = jnp.sum(each_B * weight_B)
        sums = {
            "loss": total,
            "prediction": jnp.sum(jax.nn.sigmoid(logit_B) * weight_B),
            "label": jnp.sum(label_B * weight_B),
        }
        return total, sums if key is not None else {**sums, "histograms": histograms(logit_B, label_B, weight_B)}

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """(B,) float32, from a batch with bags."""
        vector_BD = self._mlp(params["bottom"], batch["dense"].astype(self.precision.compute), last=False)
        bags_BFD = self.tables.joined(batch)
        first_B1D = jax.reshard(vector_BD, axes.spec("act_batch", "table_width"))[:, None]
        vectors_BFD = jnp.concatenate([first_B1D, bags_BFD.astype(first_B1D.dtype)], axis=1)
        products_BFF = jnp.einsum("BFD,BGD->BFG", vectors_BFD, vectors_BFD, out_sharding=P(*ROWS, None))
        left, right = np.tril_indices(vectors_BFD.shape[1], -1)
        pairs = products_BFF.at[:, jnp.asarray(left), jnp.asarray(right)].get(out_sharding=ROWS)
        return self._mlp(params["top"], jnp.concatenate([vector_BD, pairs], axis=1), last=True)[:, 0]

    def _mlp(self, layers: Params, x: jax.Array, last: bool) -> jax.Array:
        """ReLU after each layer; with `last` the last layer is linear and float32 (a logit)."""
        for number in range(len(layers)):
            layer, is_last = layers[str(number)], number == len(layers) - 1
            dtypes = self.precision
            if last and is_last:
                dtypes = dataclasses.replace(dtypes, compute=jnp.float32, matmul="compute")
                x = x.astype(jnp.float32)
            names = _weight_axes(number, len(layers))
            product = Projection("BI,IO->BO", names, x=ROWS, y=ROWS, out=ROWS)
            (x,) = project((product,), dtypes, x, (layer["weight"],))
            x = x + layer["bias"].astype(x.dtype)
            x = x if last and is_last else jax.nn.relu(x)
        return x

    def flops_per_token(self, sequence: int) -> float:  # noqa: ARG002 - examples have no length
        """Of an example: 6 a weight of the MLPs, and 6 a number of each pair of vectors; lookups cost nothing."""
        weights = sum(a * b for sizes in (self._bottom, self._top) for a, b in itertools.pairwise(sizes))
        return 6.0 * (weights + (len(self.model.tables) + 1) ** 2 * self.model.width)


def _mlp_parameters(name: str, sizes: Sequence[int]) -> dict[str, Parameter]:
    """Weights of He et al. 2015 (standard deviation sqrt(2 / inputs)), biases of zero."""
    table: dict[str, Parameter] = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        names = _weight_axes(number, len(sizes) - 1)
        table[f"{name}/{number}/weight"] = Parameter((inputs, outputs), names, scale=(2 / inputs) ** 0.5)
        table[f"{name}/{number}/bias"] = Parameter((outputs,), ("norm",), init="zeros")
    return table


def _weight_axes(number: int, layers: int) -> tuple[str | None, str | None]:
    """Hidden units are what `fsdp` splits: inputs and outputs of an MLP have whatever sizes the data has."""
    return (None, "embed") if number < layers - 1 or layers == 1 else ("embed", None)
