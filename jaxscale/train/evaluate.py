"""Evaluation over the held-out documents: loss, perplexity and bits per byte.

Read next: `train/loop.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxscale.task import PER_LAYER, Batch, Params, Task

Evaluate = Callable[[Params, Batch], dict[str, jax.Array]]


def make_evaluate(task: Task) -> Evaluate:
    """The jitted evaluation of one batch: float32 sums over its tokens (or examples), and `tokens`, their weight."""

    def evaluate(params: Params, batch: Batch) -> dict[str, jax.Array]:
        _, sums = task.loss(params, batch, None)
        scalars = {name: value for name, value in sums.items() if not name.startswith(PER_LAYER)}
        return {**scalars, "tokens": batch["loss_weight"].sum()}

    return jax.jit(evaluate)


def evaluate_batches(
    evaluate: Evaluate,
    params: Params,
    batches: Iterable[Batch],
    summarise: Callable[[Mapping[str, Any]], dict[str, float]],
) -> dict[str, float]:
    """`summarise` of the sums over all batches, which are added up on the host in float64; empty without batches."""
    totals: dict[str, Any] = {}
    for batch in batches:
        for name, value in jax.device_get(evaluate(params, batch)).items():
            totals[name] = totals.get(name, 0.0) + np.float64(value)
    return summarise(totals) if totals.get("tokens") else {}


def summarise(totals: Mapping[str, Any], bytes_per_token: float) -> dict[str, float]:
    """From sums over the tokens of text to what a person compares.

    Returns `eval_loss` (nats per token), `eval_perplexity`, `eval_bits_per_byte`, `eval_tokens`. bytes_per_token: bytes
    of the held-out text by predicted token, which makes models with other tokenizers comparable.
    """
    totals = {name: float(value) for name, value in totals.items()}
    loss = totals["loss"] / totals["tokens"]
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval_bits_per_byte": loss / math.log(2) / bytes_per_token,
        "eval_tokens": totals["tokens"],
    }
