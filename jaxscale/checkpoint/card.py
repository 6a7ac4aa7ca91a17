"""A model card: what a version is, how it was evaluated, and where it comes from, as Markdown. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from jaxscale.checkpoint.lineage import as_text
from jaxscale.checkpoint.promotion import find
from jaxscale.checkpoint.versions import Registry, Version


def card(registry: Registry, name: str, config: Mapping[str, Any], arrays: Mapping[str, int]) -> str:
    """The card of a version.

    `config`: that of its step. `arrays`: path of an array of the state -> its elements. Raises PromotionRefused for a
    name that is none.
    """
    version = find(registry, name)
    lineage = version.lineage
    weights = sum(size for path, size in arrays.items() if path.startswith("params/"))
    sections = [
        f"# {lineage.get('recipe') or 'model'} {name}",
        _table(
            {
                "state": version.state,
                "step": f"{version.step:,}",
                "tagged": _date(version.tagged),
                "manifest": f"`{version.digest}`",
                "parameters": f"{weights:,}",
                "model": _model(config),
            }
        ),
        "## Evaluation",
        _evaluation(registry, version),
        "## Lineage",
        _table(
            {
                "config": f"`{lineage.get('config_hash')}`",
                "data": f"`{as_text(lineage.get('data'))}`",
                "rows of data": f"{lineage.get('rows'):,}" if isinstance(lineage.get("rows"), int) else "not known",
                "code": _code(lineage),
                "mesh": ", ".join(f"{axis} {size}" for axis, size in (lineage.get("mesh") or {}).items() if size > 1)
                or "one device",
                "parents": "; ".join(map(_parent, lineage.get("parents") or ()))
                or "none: trained from its initialisation",
            }
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _evaluation(registry: Registry, version: Version) -> str:
    one = version.evaluation
    if one is None:
        return "This step was not evaluated."
    lines = [f"Loss {one.loss:.4f} nats per token on {one.tokens:,.0f} tokens of held-out documents."]
    current = registry.production
    if current is not None and current.name != version.name and current.evaluation is not None:
        difference = one.loss - current.evaluation.loss
        lines.append(f"{current.name}, in production: {current.evaluation.loss:.4f} ({difference:+.4f}).")
    return " ".join(lines)


def _model(config: Mapping[str, Any]) -> str:
    model = config.get("model")
    if not isinstance(model, Mapping):
        return "not known"
    shown = [
        f"{name} {value}" for name, value in model.items() if isinstance(value, int) and not isinstance(value, bool)
    ]
    return ", ".join([str(model.get("kind") or "model"), *shown[:8]])


def _code(lineage: Mapping[str, Any]) -> str:
    packages = lineage.get("packages") or {}
    git = lineage.get("git") or {}
    names = [f"{name} {packages[name]}" for name in ("jaxscale", "jax", "jaxlib") if name in packages]
    return ", ".join([*names, *(f"{name} `{value}`" for name, value in git.items())]) or "not known"


def _parent(parent: Mapping[str, Any]) -> str:
    step = "newest" if parent.get("step") is None else f"step {parent['step']:,}"
    digest = parent.get("digest")
    return f"{parent.get('run')} {step}" + (f" (`{digest}`)" if digest else " (not there any more)")


def _table(rows: Mapping[str, str]) -> str:
    lines: Iterable[str] = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
