"""Evaluation over the held-out documents: loss, perplexity and bits per byte.

Read next: `train/loop.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import jax

from jaxscale.task import Batch, Params, Task

Evaluate = Callable[[Params, Batch], dict[str, jax.Array]]


def make_evaluate(task: Task) -> Evaluate:
    """The jitted evaluation of one batch: float32 sums over its tokens, `tokens` (their weight) among them."""

    def evaluate(params: Params, batch: Batch) -> dict[str, jax.Array]:
        _, sums = task.loss(params, batch, None)
        return {**sums, "tokens": batch["loss_weight"].sum()}

    return jax.jit(evaluate)


def evaluate_batches(
    evaluate: Evaluate, params: Params, batches: Iterable[Batch], bytes_per_token: float
) -> dict[str, float]:
    """Means over all tokens of all batches, summed on the host in float64.

    Returns `eval_loss` (nats per token), `eval_perplexity`, `eval_bits_per_byte`, `eval_tokens`; empty without batches.
    bytes_per_token: bytes of the held-out text by predicted token, which makes models with other tokenizers comparable.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(evaluate(params, batch)).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    if not totals.get("tokens"):
        return {}
    return summarise(totals, bytes_per_token)


def summarise(totals: Mapping[str, float], bytes_per_token: float) -> dict[str, float]:
    """From sums over tokens to what a person compares."""
    loss = totals["loss"] / totals["tokens"]
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval_bits_per_byte": loss / math.log(2) / bytes_per_token,
        "eval_tokens": totals["tokens"],
    }
