"""Axis sizes of a world without JAX: the coordinator plans meshes, and imports nothing heavy.

Read next: `worlds.py`.
"""

from __future__ import annotations

from jaxscale.config import Config


def resolved_sizes(config: Config, slices: int, devices_per_slice: int) -> dict[str, int]:
    """Sizes of all mesh axes, as `mesh_sizes.resolve_sizes` gives them. Raises MeshError."""
    from jaxscale.mesh_file import load_mesh_file
    from jaxscale.mesh_sizes import resolve_sizes

    file = load_mesh_file(config.on) if config.on else None
    return resolve_sizes(config.mesh, slices * devices_per_slice, slices, file.axes if file else None)
