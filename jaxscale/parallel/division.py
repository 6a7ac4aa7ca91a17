"""How a model's layers are divided into the chunks of a pipeline, evenly or as a config says.

Programs are one for all stages, so each chunk has places for as many layers as the longest one; the places that a
shorter one does not need are padding: zeros that nobody reads and nothing updates. Pure. Read next: `layer_layout.py`,
where layers lie, and `costs.py`, which balances them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxscale.config import Config, PipelineConfig
from jaxscale.config_error import ConfigError, choices
from jaxscale.divisors import divisors
from jaxscale.parallel.costs import partition
from jaxscale.task import Parameter


@dataclass(frozen=True)
class Division:
    """Layers of each chunk of a model, in the model's order; chunk q is on stage q mod `stages`."""

    stages: int
    sizes: tuple[int, ...]

    @property
    def chunks(self) -> int:
        """Of each stage."""
        return len(self.sizes) // self.stages

    @property
    def layers(self) -> int:
        """Of the model."""
        return sum(self.sizes)

    @property
    def longest(self) -> int:
        """Places of each chunk."""
        return max(self.sizes)

    @property
    def places(self) -> int:
        """Of all chunks; those above `layers` are padding."""
        return self.longest * len(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """First layer of each chunk."""
        return tuple(itertools.accumulate(self.sizes[:-1], initial=0))

    @property
    def order(self) -> tuple[int | None, ...]:
        """Place in the program -> layer of the model, stage by stage; None = padding."""
        own = [c * self.stages + s for s in range(self.stages) for c in range(self.chunks)]
        return tuple(self.starts[q] + i if i < self.sizes[q] else None for q in own for i in range(self.longest))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each chunk: its layers to those of an even share."""
        return tuple(size * len(self.sizes) / self.layers for size in self.sizes)


def divide(layers: int, stages: int, pipeline: PipelineConfig) -> Division:
    """As the config says, or evenly. Without stages all layers are one chunk. Raises ConfigError."""
    if stages == 1:
        return Division(1, (layers,))
    depth, given = stages * pipeline.chunks, pipeline.layers
    if not given:
        if layers % stages:
            options = choices(divisors(layers))
            raise ConfigError(f"mesh axis 'stage' ({stages}) does not divide layers ({layers}); use {options}")
        if layers % depth:
            options = choices(divisors(layers // stages))
            raise ConfigError(
                f"pipeline.chunks ({pipeline.chunks}) does not divide the {layers // stages} layers of a stage; "
                f"use {options}"
            )
        return Division(stages, (layers // depth,) * depth)
    shown = " ".join(map(str, given))
    if len(given) != depth:
        parts = f"{stages} stages" if pipeline.chunks == 1 else f"{stages} stages of {pipeline.chunks} chunks"
        raise ConfigError(
            f"pipeline.layers is {shown}, which divides the model into {len(given)}, and {parts} are {depth}; give "
            f"{depth} numbers, or none for an even division"
        )
    if sum(given) != layers:
        raise ConfigError(
            f"pipeline.layers is {shown}, {sum(given)} layers in all, and model.layers is {layers}; make the sum "
            f"{layers}"
        )
    return Division(stages, given)


def balanced(config: Config, parameters: Mapping[str, Parameter], stages: int) -> tuple[int, ...] | None:
    """The division whose slowest chunk has least to do, by the weights that a token is multiplied by, the head's among
    them; an embedding is looked up and costs nothing. None: there are fewer layers than chunks.

    parameters: the model's own. Windows that repeat every few layers are kept whole.
    """
    layers = next(p.shape[0] for p in parameters.values() if p.axes[:1] == ("layers",))
    period = len(getattr(config.model, "window", ())) or 1
    depth = stages * config.pipeline.chunks
    if layers % period or layers // period < depth:
        return None
    layer, head = work_of(config, parameters)
    groups = partition([layer * period] * (layers // period), depth, last=head)
    return tuple(count * period for count in groups)


def work_of(config: Config, parameters: Mapping[str, Parameter]) -> tuple[float, float]:
    """Weights that a token is multiplied by: of a layer (of experts those it goes to), and of the head. Attention's
    scores, whose number depends on the sequence, are left out.
    """
    experts = getattr(config.model, "experts", None)
    share = experts.top_k / experts.count if experts is not None and experts.count else 1.0
    layer = head = 0.0
    for parameter in parameters.values():
        size = math.prod(parameter.shape)
        if parameter.axes[:1] == ("layers",):
            layer += size / parameter.shape[0] * (share if "experts" in parameter.axes else 1.0)
        elif "vocab" in parameter.axes:
            head = max(head, float(size))  # the table of an untied model is as large, and only looked up
    return layer, head


def in_program(parameters: Mapping[str, Parameter], division: Division) -> dict[str, Parameter]:
    """The model's table of parameters with the places that a program has for the layers."""
    return {
        path: replace(p, shape=(division.places, *p.shape[1:])) if p.axes[:1] == ("layers",) else p
        for path, p in parameters.items()
    }
