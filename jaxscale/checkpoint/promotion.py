"""What may move where: candidate -> canary -> production -> retired, through a gate. Pure.

A version moves up one stage at a time, and only with an evaluation that is not worse than that of what is in production
by more than a margin. Production has one version; what it was before is retired, and `rolled_back` brings it back. Read
next: `versions.py`, the journal of the moves.
"""

from __future__ import annotations

import math

from jaxscale.checkpoint.versions import Evaluation, Registry, State, Version
from jaxscale.config_error import ConfigError

MARGIN = 0.01
"""Nats per token."""
NEXT: dict[State, State] = {"candidate": "canary", "canary": "production"}

Moves = list[tuple[str, State]]


class PromotionRefused(ConfigError):
    """The gate is closed, or there is no such way. The message says why, and what would open it."""


def find(registry: Registry, name: str) -> Version:
    """Raises PromotionRefused for a name that is none."""
    if name not in registry.versions:
        there = ", ".join(registry.versions) or "none yet; `checkpoints tag` makes one"
        raise PromotionRefused(f"there is no version {name!r}; there are: {there}")
    return registry.versions[name]


def promoted(registry: Registry, name: str, margin: float = MARGIN) -> Moves:
    """One stage up. `margin`: how much worse than production it may be, nats per token. Raises PromotionRefused."""
    version = find(registry, name)
    if version.state not in NEXT:
        there = "is in production already" if version.state == "production" else "is retired, and stays that"
        hint = "" if version.state == "production" else "; tag its step with another name to try it again"
        raise PromotionRefused(f"version {name!r} {there}{hint}")
    current = registry.production
    check_gate(version, current, margin)
    to = NEXT[version.state]
    moves: Moves = [(name, to)]
    return [(current.name, "retired"), *moves] if to == "production" and current is not None else moves


def retired(registry: Registry, name: str) -> Moves:
    """Out of the way, for good. Raises PromotionRefused."""
    version = find(registry, name)
    if version.state == "production":
        raise PromotionRefused(
            f"version {name!r} is in production; promote another one, or roll back, and it is retired"
        )
    return [] if version.state == "retired" else [(name, "retired")]


def rolled_back(registry: Registry) -> Moves:
    """What was in production before is again. Raises PromotionRefused where there is nothing before."""
    if len(registry.served) < 2:
        current = f"only {registry.served[-1]!r} was ever" if registry.served else "nothing is"
        raise PromotionRefused(f"there is nothing to roll back to: {current} in production")
    return [(registry.served[-1], "retired"), (registry.served[-2], "production")]


def check_gate(version: Version, current: Version | None, margin: float) -> None:
    """Raises PromotionRefused where the evaluation is missing, of other documents, or worse by more than `margin`."""
    if not (math.isfinite(margin) and margin >= 0):
        raise PromotionRefused(f"--margin is {margin}; use 0 or more nats per token")
    mine = _evaluation(version)
    if current is None:
        return
    theirs = _evaluation(current)
    if mine.tokens != theirs.tokens:
        raise PromotionRefused(
            f"version {version.name!r} was evaluated on {mine.tokens:,.0f} tokens and {current.name!r}, which is in "
            f"production, on {theirs.tokens:,.0f}: evaluations of other documents cannot be compared; evaluate both on "
            "the same, and tag with --eval-loss and --eval-tokens"
        )
    if mine.loss > theirs.loss + margin:
        raise PromotionRefused(
            f"version {version.name!r} has an evaluation loss of {mine.loss:.4f}, and {current.name!r}, which is in "
            f"production, {theirs.loss:.4f}: worse by {mine.loss - theirs.loss:.4f}; {margin:g} is allowed (--margin)"
        )


def _evaluation(version: Version) -> Evaluation:
    if version.evaluation is None:
        raise PromotionRefused(
            f"version {version.name!r} has no evaluation: its step {version.step} was not evaluated; evaluate it, and "
            "tag the step with another name and --eval-loss (evaluate.every does it while training)"
        )
    if not math.isfinite(version.evaluation.loss):
        raise PromotionRefused(f"version {version.name!r} has an evaluation loss of {version.evaluation.loss}")
    return version.evaluation
