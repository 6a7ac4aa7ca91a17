"""Sizes of the mesh axes: arithmetic, without JAX, so that a coordinator can plan meshes and import nothing heavy.

Read next: `mesh.py`, which makes meshes of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from jaxscale.config import ConfigError, MeshConfig
from jaxscale.config_error import choices
from jaxscale.divisors import divisors

AXES = tuple(MeshConfig.__dataclass_fields__)


class MeshError(ConfigError):
    """A mesh that the devices cannot form. The message has the numbers and sizes that would work."""


def resolve_sizes(
    mesh: MeshConfig, devices: int, slices: int = 1, defaults: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Sizes of all six axes, in order, whose product is `devices`.

    Set axes keep their size (`mesh` before `defaults`, a mesh file's). Of the unset ones `data` takes the slices,
    `fsdp` absorbs what is left, and the others are 1. Raises MeshError.
    """
    given = dict(defaults or {}) | {k: v for k, v in dataclasses.asdict(mesh).items() if v is not None}
    if devices % slices:
        raise MeshError(f"{devices} devices cannot be {slices} equal slices; use {choices(divisors(devices))} slices")
    sizes = {axis: given.get(axis, 1) for axis in AXES} | {"data": given.get("data", slices)}
    if sizes["data"] % slices:
        works = [size for size in divisors(devices) if size % slices == 0]
        raise MeshError(
            f"mesh axis 'data' ({sizes['data']}) is not a multiple of the {slices} slices; it runs across slices, so "
            f"that only gradients cross the slow links between them; use {choices(works)}, or leave mesh.data unset"
        )
    if "fsdp" not in given:
        sizes["fsdp"] = max(1, devices // math.prod(size for axis, size in sizes.items() if axis != "fsdp"))
    total = math.prod(sizes.values())
    if total != devices:
        product = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)
        raise MeshError(
            f"mesh {product} = {total} does not match {devices} devices; {_remedy(sizes, given, devices, slices)}"
        )
    return sizes


def _remedy(sizes: Mapping[str, int], given: Mapping[str, int], devices: int, slices: int) -> str:
    """Which one axis to change, and to what; or, where one is not enough, what the axes must multiply to."""
    free = "fsdp" not in given
    axes = [axis for axis in sizes if axis in given or (axis == "data" and not free)]
    options = []
    for axis in axes:
        others = math.prod(size for other, size in sizes.items() if other != axis and not (free and other == "fsdp"))
        fitting = [
            size
            for size in divisors(devices)
            if (devices % (others * size) == 0 if free else others * size == devices)
            and (axis != "data" or size % slices == 0)
        ]
        if fitting:
            options.append(f"mesh.{axis} {choices(fitting)}")
    fixed = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
    if not options:
        must = f"a divisor of {devices}: {choices(divisors(devices))}" if free else f"a divisor of {devices}"
        return f"the axes other than fsdp multiply to {fixed}, and must multiply to {must}"
    unset = "" if free or devices % fixed else ", or leave mesh.fsdp unset"
    return f"use {choices(options)}{unset}"
