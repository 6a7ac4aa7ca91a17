"""A mixture of experts token by token in NumPy float64: what the layer is compared with."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def plain_moe(x, weights, config, real=None, weight=None, capacity=None):
    """(output, {"load", "dropped", "balance", "z"}): sums weighted by `weight`, and the losses without coefficients.

    x: (B, S, D); weights: block -> name -> array; real, weight: (B, S); capacity: tokens of a row that an expert takes.
    """
    B, S, _ = x.shape
    E, K = config.count, config.top_k
    real = np.ones((B, S), bool) if real is None else real
    weight = np.ones((B, S)) if weight is None else weight
    out = np.zeros_like(x)
    load, shares, square, dropped = np.zeros(E), np.zeros(E), 0.0, 0.0
    for b in range(B):
        taken = np.zeros(E, int)
        for s in range(S):
            logits = x[b, s] @ weights["router"]["weight"]
            soft = np.exp(logits - logits.max())
            soft /= soft.sum()
            scores = soft if config.score == "softmax" else 1 / (1 + np.exp(-logits))
            ranked = scores + weights["router"].get("bias", np.zeros(E))
            chosen = np.argsort(-ranked, kind="stable")[:K]
            gates = scores[chosen]
            gates = config.scale * (gates / gates.sum() if config.normalise else gates)
            load[chosen] += weight[b, s]
            shares += weight[b, s] * scores / scores.sum()
            square += weight[b, s] * np.log(np.exp(logits).sum()) ** 2
            if real[b, s]:
                for e, gate in zip(chosen, gates, strict=True):
                    taken[e] += 1
                    if capacity is not None and taken[e] > capacity:
                        dropped += weight[b, s]
                        continue
                    w = {name: value[e] for name, value in weights["experts"].items()}
                    out[b, s] += gate * ((silu(x[b, s] @ w["gate"]) * (x[b, s] @ w["up"])) @ w["down"])
            if "shared" in weights:
                w = weights["shared"]
                out[b, s] += (silu(x[b, s] @ w["gate"]) * (x[b, s] @ w["up"])) @ w["down"]
    balance = E * np.sum(load / (K * weight.sum()) * shares / weight.sum()) * weight.sum()
    return out, {"load": load, "dropped": dropped, "balance": balance, "z": square}
