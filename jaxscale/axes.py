"""Logical axis names -> mesh axes: one frozen table decides how every tensor is sharded.

Weights and activations use different words, so that FSDP is visible: a weight's `embed` dim is sharded over `fsdp`, an
activation's `act_embed` is not. Words: *axis* = mesh axis, *dim* = tensor dim, *logical axis* = a word of this table.
Read next: `audit.py`, which refuses tables that waste devices, then `models/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""The six mesh axes, outer (slow links) to inner (fast links); all always present, size 1 allowed."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are split."""

RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        # weights
        "layers": ("stage",),
        "embed": ("fsdp",),
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "mlp": ("tensor",),
        "norm": (),
        "experts": ("expert",),
        "router": (),
        # embedding tables (parallel/table.py)
        "table_rows": BATCH_AXES,
        "table_bins": BATCH_AXES,
        "table_columns": ("tensor", *BATCH_AXES),
        "table_width": ("tensor",),
        # activations
        "act_batch": BATCH_AXES,
        "act_sequence": ("context",),
        "act_residual_sequence": ("context", "tensor"),
        "act_attended_sequence": (),
        "act_embed": (),
        "act_heads": ("tensor",),
        "act_kv_heads": ("tensor",),
        "act_mlp": ("tensor",),
        "act_vocab": ("tensor",),
        "act_experts": ("expert",),
        "act_slots": ("data", "fsdp", "context"),
        "act_residual_slots": ("data", "fsdp", "context", "tensor"),
        "act_rows": ("data", "fsdp", "expert", "context"),
        "act_residual_rows": ("data", "fsdp", "expert", "context", "tensor"),
    }
)

GATHERED = frozenset({"fsdp"})
"""Mesh axes that store weights only: a weight is gathered over them just before it is used."""


class UnknownAxis(ValueError):
    """A logical axis that the table does not have."""


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """Mesh axes of one logical axis; None is replicated. Raises UnknownAxis."""
    if name is None:
        return ()
    if name not in RULES:
        raise UnknownAxis(f"unknown logical axis {name!r}; axes.RULES has {', '.join(sorted(RULES))}")
    return RULES[name]


def spec(*names: str | None) -> P:
    """PartitionSpec of a tensor whose dims carry these logical axes: spec("embed", "mlp") -> P("fsdp", "tensor").

    Without the axes that a surrounding `jax.shard_map` has made manual: there a tensor is one part of the whole.
    """
    gone = manual()
    return P(*(_entry(tuple(a for a in mesh_axes(name) if a not in gone)) for name in names))


def gathered_spec(names: Sequence[str | None]) -> P:
    """The same for a weight at the moment of its use: without the axes it is only stored over."""
    gone = GATHERED | manual()
    return P(*(_entry(tuple(a for a in mesh_axes(name) if a not in gone)) for name in names))


def sharding(names: Sequence[str | None], mesh: Mesh | AbstractMesh | None = None) -> NamedSharding:
    """NamedSharding on `mesh`, or on the mesh that `jax.set_mesh` made current."""
    mesh = mesh if mesh is not None else jax.sharding.get_mesh()
    return NamedSharding(mesh, spec(*names))


def abstract_mesh(sizes: Mapping[str, int], device: AbstractDevice | None = None) -> AbstractMesh:
    """A mesh without devices, for lowering programs of any size on a laptop. Missing axes get size 1."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device)


def automatic() -> set[str]:
    """Axes of the current mesh that no surrounding `jax.shard_map` has made manual: what an inner one can be over."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}


def manual() -> frozenset[str]:
    """Axes of the current mesh that a surrounding `jax.shard_map` has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(mesh.axis_names) - automatic()


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Over how many devices the rows of a batch are split."""
    count = 1
    for axis in BATCH_AXES:
        count *= sizes[axis]
    return count


def padded_batch(rows: int, microbatches: int, shards: int) -> int:
    """Rows of the batch on the devices: each microbatch is padded to a multiple of the shards it is split over."""
    per_microbatch = rows // microbatches
    return -(-per_microbatch // shards) * shards * microbatches


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not axes else axes[0] if len(axes) == 1 else axes
