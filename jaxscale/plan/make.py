"""A config -> its plan: from arithmetic alone, or from the compiled step. Read next: `report.py`."""

from __future__ import annotations

import dataclasses

import jax

from jaxscale import audit
from jaxscale.config import Config
from jaxscale.host_memory import bytes_on_host
from jaxscale.mesh import abstract_mesh_for, mesh_sizes
from jaxscale.mesh_file import load_chip, load_mesh_file
from jaxscale.optim.build import make_optimizer
from jaxscale.parallel.costs import Choice
from jaxscale.parallel.division import Division, divide, work_of
from jaxscale.plan.compiled import compile_step, topology_mesh
from jaxscale.plan.program_text import read_program, total_flops
from jaxscale.plan.report import Plan, hidden_share, links_of, schedules_of
from jaxscale.plan.traffic import transfers
from jaxscale.train.state import State, abstract_state, state_bytes
from jaxscale.train.summary import KINDS, bytes_per_device, human_bytes
from jaxscale.tree import flatten


def make_plan(config: Config, compiles: bool) -> Plan:
    """Raises AuditError and PlanError. Makes no array."""
    mesh = abstract_mesh_for(config)
    sizes = mesh_sizes(mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        task = config.model.task(config)
        report = audit.audit(task.parameters, sizes, config)
        optimizer = make_optimizer(config.optim, task.parameters, config.steps)
        state = abstract_state(config, task, optimizer)
    layers = next((p.shape[0] for p in task.parameters.values() if p.axes[:1] == ("layers",)), 0)
    reduce_bytes = 4 if config.precision.reduce == "float32" else 2
    schedules: tuple[Choice, ...] = ()
    padding = ""
    if sizes["stage"] > 1:
        layer, head = work_of(config, task.parameters)
        schedules = schedules_of(layers, sizes["stage"], config.train.microbatches, config.pipeline, head / layer)
        padding = _padding(divide(layers, sizes["stage"], config.pipeline), state, reduce_bytes)
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "every axis 1"
    plan = Plan(
        name=config.name,
        mesh=f"{shown} on {config.on}" if config.on else shown,
        parameters=report.parameters,
        held=state_bytes(config, task, state),
        on_host=bytes_on_host(state),
        capacity=load_chip(load_mesh_file(config.on).chip).hbm_bytes.value if config.on else 0.0,
        schedules=schedules,
        padding=padding,
        schedule=f"{config.pipeline.schedule} {config.pipeline.chunks}",
        warnings=report.warnings,
    )
    if not compiles:
        return plan
    step = compile_step(config, topology_mesh(config))
    program = read_program(step.text)
    found = transfers(program, sizes)
    figures = {k: v for k, v in dataclasses.asdict(step).items() if k != "text"}
    figures |= {"total": step.device_bytes, "flops": total_flops(program)}
    return dataclasses.replace(plan, compiled=figures, links=links_of(found), hidden_in_loops=hidden_share(found))


def _padding(division: Division, state: State, reduce_bytes: int) -> str:
    """What the stage with the fewest layers keeps for nothing, since arrays are alike on all stages."""
    if division.places == division.layers:
        return ""
    stacked = {
        kind: {path: leaf for path, leaf in flatten({kind: state[kind]}).items() if "layers" in path.split("/")}
        for kind in KINDS
        if kind in state
    }
    own = [sum(division.sizes[s :: division.stages]) for s in range(division.stages)]
    places = division.longest * division.chunks
    unused = sum(bytes_per_device(stacked, reduce_bytes).values()) * (places - min(own)) / places
    return (
        f"stages have {' '.join(map(str, own))} layers and places for {places} each: up to {human_bytes(unused)} of a "
        "device's parameters, optimizer and gradients are padding"
    )
