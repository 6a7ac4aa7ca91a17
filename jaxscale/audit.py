"""The audit at start: refuses a mesh that cannot hold a model or silently wastes devices, and says what would work.

Pure: it sees the parameter table, the axis sizes and the config, makes no array, and lists everything it finds at once.
Read next: `models/transformer.py`, whose parameter table it checks, then `docs/sharding.md` for the rules in prose.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxscale import axes
from jaxscale.config import Config, ConfigError
from jaxscale.config_error import choices
from jaxscale.divisors import divisors
from jaxscale.host_memory import is_streamed
from jaxscale.parallel import context
from jaxscale.parallel.division import balanced, divide, in_program
from jaxscale.parallel.schedules import ScheduleError, check_sizes
from jaxscale.task import Parameter

REPLICATED_SHARE = 0.02
"""Share of the parameters' bytes that may be replicated over the axis that stores weights."""
PADDED_SHARE = 0.25
"""Share of padding rows above which the report warns."""
BYTES = {"bfloat16": 2, "float32": 4}
LISTED = 8


class AuditError(ConfigError):
    """Everything that is wrong between this model, this batch and this mesh, one finding a line."""


@dataclass(frozen=True)
class AuditReport:
    """What the start summary says about memory and padding."""

    parameters: int
    """Number of weights of the model."""
    bytes_per_device: Mapping[str, int]
    """Bytes of each parameter on one device, by path."""
    rows: int
    """Rows of a batch (the first phase's)."""
    padded_rows: int
    """Rows on the devices: each microbatch is filled up to a multiple of the devices that split it."""
    warnings: tuple[str, ...]


def audit(parameters: Mapping[str, Parameter], sizes: Mapping[str, int], config: Config) -> AuditReport:
    """Checks a model's parameters, the sequences and the batches of `config` against the axis `sizes`.

    Raises AuditError on: an unknown logical axis; a dim that its mesh axes do not divide; a mesh axis that shards two
    dims of one tensor; a mesh axis > 1 that shards nothing; a sequence that context x tensor does not divide; more than
    2 % of the parameters replicated over `fsdp` though a dim of theirs could be sharded. Padding is only warned of.
    """
    named = [f"{problem} of {path}" for path, parameter in parameters.items() for problem in _shape(parameter)]
    if named:  # Nothing else can be said about tensors whose dims have no meaning.
        raise _error(named, sizes)
    kept = _with_padding(parameters, sizes, config)
    problems = [
        *_indivisible(kept, sizes),
        *_used_twice(parameters, sizes),
        *_sequences(config, sizes),
        *_context(parameters, sizes, config),
        *_idle_axes(parameters, sizes, config),
        *_pipeline(parameters, sizes, config),
        *_replicated(parameters, sizes),
        *_zero(parameters, sizes, config),
        *_offload(parameters, sizes, config),
    ]
    if problems:
        raise _error(problems, sizes)
    shards = axes.batch_shards(sizes)
    return AuditReport(
        parameters=sum(math.prod(parameter.shape) for parameter in parameters.values()),
        bytes_per_device={
            path: math.prod(parameter.shape) * BYTES[config.precision.weights] // _shards(parameter, sizes, config)
            for path, parameter in kept.items()
        },
        rows=config.data.batch,
        padded_rows=axes.padded_batch(config.data.batch, config.train.microbatches, shards),
        warnings=tuple(_padding(config, shards)),
    )


def _shape(parameter: Parameter) -> Iterator[str]:
    if len(parameter.axes) != len(parameter.shape):
        yield f"{len(parameter.axes)} logical axes {parameter.axes} for {len(parameter.shape)} dims {parameter.shape}"
    for name in parameter.axes:
        if name is not None and name not in axes.RULES:
            nearest = difflib.get_close_matches(name, axes.RULES, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            yield f"unknown logical axis {name!r} ({hint}axes.RULES has {', '.join(axes.RULES)})"


def _indivisible(parameters: Mapping[str, Parameter], sizes: Mapping[str, int]) -> Iterator[str]:
    """Dims that their mesh axes do not divide; tensors with the same logical axis and size share a line."""
    found: dict[tuple[tuple[str, ...], str, int], list[str]] = {}
    for path, parameter in parameters.items():
        for name, size in zip(parameter.axes, parameter.shape, strict=True):
            mesh_axes = _split_over(name, sizes)
            if name == "layers":
                continue  # `_pipeline` says more of them
            if size % math.prod(sizes[axis] for axis in mesh_axes):
                found.setdefault((mesh_axes, str(name), size), []).append(path)
    for (mesh_axes, name, size), paths in found.items():
        options = _near(divisors(size), math.prod(sizes[axis] for axis in mesh_axes))
        yield f"{_called(mesh_axes, sizes)} {name} ({size}) of {_listed(paths)}; use {options}"


def _used_twice(parameters: Mapping[str, Parameter], sizes: Mapping[str, int]) -> Iterator[str]:
    for path, parameter in parameters.items():
        split = [(axis, str(name)) for name in parameter.axes for axis in _split_over(name, sizes)]
        for axis in dict.fromkeys(axis for axis, _ in split):
            names = [name for other, name in split if other == axis]
            if len(names) > 1:
                yield f"mesh axis {axis!r} splits {len(names)} dims of {path} ({', '.join(names)}); rename all but one"


def _sequences(config: Config, sizes: Mapping[str, int]) -> Iterator[str]:
    if config.model.unit != "tokens":
        return
    mesh_axes = _split_over("act_residual_sequence", sizes)
    shards = math.prod(sizes[axis] for axis in mesh_axes)
    for where, sequence in _each_phase(config, "sequence"):
        if sequence % shards:
            below = sequence // shards * shards
            options = [size for size in (below, below + shards) if size]
            yield f"{_called(mesh_axes, sizes)} the sequence ({sequence}, {where}); use {choices(options)} tokens"


def _context(parameters: Mapping[str, Parameter], sizes: Mapping[str, int], config: Config) -> Iterator[str]:
    """Attention that cannot be divided over `context` in the way that the model says. A model without attention over
    its sequence says nothing.
    """
    form = getattr(config.model, "context", None)
    heads, kv_heads = (
        {size for p in parameters.values() for dim, size in zip(p.axes, p.shape, strict=True) if dim == name}
        for name in ("heads", "kv_heads")
    )
    if form is None or sizes["context"] == 1 or len(heads) != 1 or len(kv_heads) != 1:
        return
    (own,), (own_keys,) = heads, kv_heads
    if own % sizes["tensor"] or own_keys % sizes["tensor"]:
        return  # found above
    for where, sequence in _each_phase(config, "sequence"):
        try:
            chosen = context.choose(form, sizes, length=sequence, heads=own, kv_heads=own_keys)
        except context.UnsupportedContext as error:
            yield f"{error} ({where})"
            continue
        if chosen in context.BALANCED and getattr(getattr(config.model, "experts", None), "capacity", None):
            yield (
                f"model.experts.capacity keeps the first tokens of a row, and model.context {chosen} has rows in "
                f"another order ({where}); use model.context ulysses, or no capacity"
            )


def _idle_axes(parameters: Mapping[str, Parameter], sizes: Mapping[str, int], config: Config) -> Iterator[str]:
    names = {name for parameter in parameters.values() for name in parameter.axes}
    used = {axis for name in names | _activations(config) for axis in axes.mesh_axes(name)}
    for axis in axes.AXES:
        if sizes[axis] > 1 and axis not in used:
            yield (
                f"mesh axis {axis!r} ({sizes[axis]}) shards nothing: no parameter, batch or sequence dim is split "
                f"over it, so its {sizes[axis]} groups of devices would repeat the same work; set mesh.{axis} to 1"
            )


def _activations(config: Config) -> set[str]:
    """Logical axes of activations that split what has to be computed."""
    return {"act_batch", "act_residual_sequence"} if config.model.unit == "tokens" else {"act_batch"}


def _pipeline(parameters: Mapping[str, Parameter], sizes: Mapping[str, int], config: Config) -> Iterator[str]:
    """What does not go with pipeline stages; of layers that they do not divide, how they could be divided."""
    stages, layers = sizes["stage"], _layers(parameters)
    if stages == 1 or not layers:
        return
    try:
        check_sizes(config.pipeline.schedule, stages, config.train.microbatches, config.pipeline.chunks)
    except ScheduleError as error:
        yield f"pipeline: {error}"
    try:
        divide(layers, stages, config.pipeline)
    except ConfigError as error:
        offered = balanced(config, parameters, stages)
        yield f"{error}{f', or --pipeline.layers {" ".join(map(str, offered))}' if offered else ''}"
    if config.train.noise_scale:
        yield "train.noise-scale needs the gradient of each microbatch by itself, which no stage has; turn it off"


def _layers(parameters: Mapping[str, Parameter]) -> int:
    """Of the model; 0 where nothing is stacked over layers."""
    return next((p.shape[0] for p in parameters.values() if p.axes[:1] == ("layers",)), 0)


def _with_padding(
    parameters: Mapping[str, Parameter], sizes: Mapping[str, int], config: Config
) -> Mapping[str, Parameter]:
    """As a program keeps them; as they are where its stages cannot divide them, which is found elsewhere."""
    if sizes["stage"] == 1 or not _layers(parameters):
        return parameters
    try:
        return in_program(parameters, divide(_layers(parameters), sizes["stage"], config.pipeline))
    except ConfigError:
        return parameters


def _zero(parameters: Mapping[str, Parameter], sizes: Mapping[str, int], config: Config) -> Iterator[str]:
    """What does not go with weights that are whole on every device."""
    level = config.state.zero
    if level == 3:
        return
    layered = any(p.axes[:1] == ("layers",) for p in parameters.values())
    if level == 2 and sizes["stage"] > 1 and layered:
        yield (
            "state.zero 2 scatters gradients as they come, and a pipeline stage adds up those of its microbatches as "
            "its weights lie; with mesh.stage set state.zero to 1 or 3"
        )
    for name, value, needed in (
        ("across.gradients", config.across.gradients, "direct"),
        ("local.every", config.local.every, 0),
    ):
        if value != needed:
            yield f"state.zero {level} does not go with {name} {value}; set state.zero to 3, or {name} to {needed}"


def _offload(parameters: Mapping[str, Parameter], sizes: Mapping[str, int], config: Config) -> Iterator[str]:
    """What does not go with a state in the hosts' memory."""
    asked = config.state.offload
    if not asked:
        return
    listed = ",".join(asked)
    if "ema" in asked and not config.optim.ema:
        yield "state.offload has ema, and optim.ema is 0: no average is kept; take it out"
    if "params" in asked and not any(is_streamed(p) for p in parameters.values()):
        yield "state.offload has params, and the model has no stack of layers to move one by one; take it out"
    if "params" in asked and sizes["stage"] > 1:
        yield "state.offload params does not go with mesh.stage: stages save the gathers that it would add to"
    for name, value, needed in (
        ("across.gradients", config.across.gradients if "params" in asked else "direct", "direct"),
        ("local.every", config.local.every, 0),
    ):
        if value != needed:
            yield f"state.offload {listed} does not go with {name} {value}; set {name} to {needed}"


def _replicated(parameters: Mapping[str, Parameter], sizes: Mapping[str, int]) -> Iterator[str]:
    for axis in axes.GATHERED:
        wasted = {
            path: math.prod(parameter.shape)
            for path, parameter in parameters.items()
            if sizes[axis] > 1 and _could_be_sharded(parameter, axis, sizes)
        }
        share = sum(wasted.values()) / max(1, sum(math.prod(parameter.shape) for parameter in parameters.values()))
        if share > REPLICATED_SHARE:
            largest = sorted(wasted, key=lambda path: -wasted[path])
            listed = _listed([f"{path} {parameters[path].shape}" for path in largest])
            words = [
                repr(name) for name in axes.RULES if axes.mesh_axes(name) == (axis,) and not name.startswith("act_")
            ]
            yield (
                f"{share:.1%} of the parameters are replicated over mesh axis {axis!r} ({sizes[axis]}), which divides "
                f"a dim of theirs (allowed are {REPLICATED_SHARE:.0%}): {listed}; name that dim {choices(words)} in "
                f"the parameter table"
            )


def _could_be_sharded(parameter: Parameter, axis: str, sizes: Mapping[str, int]) -> bool:
    """Whether no dim is over `axis`, and one that no other axis splits could be.

    The `layers` dim does not count: it is scanned, one layer at a time, so devices would wait for each other's layers.
    """
    if any(axis in axes.mesh_axes(name) for name in parameter.axes):
        return False
    return any(
        size % sizes[axis] == 0
        for name, size in zip(parameter.axes, parameter.shape, strict=True)
        if name != "layers" and all(sizes[other] == 1 for other in axes.mesh_axes(name))
    )


def _padding(config: Config, shards: int) -> Iterator[str]:
    microbatches = config.train.microbatches
    for where, rows in _each_phase(config, "batch"):
        padded = axes.padded_batch(rows, microbatches, shards)
        if padded - rows > PADDED_SHARE * padded:
            split = f"{rows} rows"
            fewer = ""
            if microbatches > 1:
                split = f"{microbatches} microbatches of {rows // microbatches} rows"
                fewer = ", or fewer microbatches"
            yield (
                f"{(padded - rows) / padded:.0%} of the rows on the devices are padding: {split} ({where}) over "
                f"{shards} devices; use batches of a multiple of {shards * microbatches}{fewer}"
            )


def _each_phase(config: Config, name: str) -> list[tuple[str, int]]:
    """(where it is set, value) of data.<name> and of every phase that changes it."""
    changes = [(f"phase from step {phase.start}", getattr(phase, name)) for phase in config.phases]
    return [(f"data.{name}", getattr(config.data, name)), *((where, value) for where, value in changes if value)]


def _split_over(name: str | None, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes that really split a dim of this logical axis."""
    return tuple(axis for axis in axes.mesh_axes(name) if sizes[axis] > 1)


def _shards(parameter: Parameter, sizes: Mapping[str, int], config: Config) -> int:
    """Parts that a weight is stored in."""
    whole_over = axes.GATHERED if config.state.zero < 3 else ()
    split_over = (axis for name in parameter.axes for axis in axes.mesh_axes(name))
    return math.prod(sizes[axis] for axis in split_over if axis not in whole_over)


def _called(mesh_axes: Sequence[str], sizes: Mapping[str, int]) -> str:
    """`mesh axis 'tensor' (4) does not divide`, or the same of several axes with their product."""
    if len(mesh_axes) == 1:
        return f"mesh axis {mesh_axes[0]!r} ({sizes[mesh_axes[0]]}) does not divide"
    product = " x ".join(str(sizes[axis]) for axis in mesh_axes)
    total = math.prod(sizes[axis] for axis in mesh_axes)
    return f"mesh axes {' x '.join(repr(axis) for axis in mesh_axes)} ({product} = {total}) do not divide"


def _error(problems: Sequence[str], sizes: Mapping[str, int]) -> AuditError:
    shown = ", ".join(f"{axis} {sizes[axis]}" for axis in axes.AXES if sizes[axis] > 1) or "one device"
    noun = "problem" if len(problems) == 1 else "problems"
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return AuditError(f"{len(problems)} {noun} between the model, the data and the mesh ({shown}):\n{listed}")


def _listed(words: Sequence[str]) -> str:
    more = len(words) - LISTED
    return ", ".join(words[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _near(options: Sequence[int], wanted: int) -> str:
    """At most LISTED of the options, those nearest to what was wanted."""
    return choices(sorted(sorted(options, key=lambda option: (abs(option - wanted), option))[:LISTED]))
