"""A config -> its plan: from arithmetic alone, or from the compiled step. Read next: `report.py`."""

from __future__ import annotations

import dataclasses

import jax

from jaxscale import audit
from jaxscale.config import Config
from jaxscale.mesh import abstract_mesh_for, mesh_sizes
from jaxscale.mesh_file import load_chip, load_mesh_file
from jaxscale.optim.build import make_optimizer
from jaxscale.plan.compiled import compile_step, topology_mesh
from jaxscale.plan.program_text import read_program, total_flops
from jaxscale.plan.report import Plan, hidden_share, links_of, schedules_of
from jaxscale.plan.traffic import transfers
from jaxscale.train.state import abstract_state
from jaxscale.train.summary import bytes_per_device, count_parameters
from jaxscale.train.tables import weights_of


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
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "every axis 1"
    plan = Plan(
        name=config.name,
        mesh=f"{shown} on {config.on}" if config.on else shown,
        parameters=count_parameters(weights_of(state)),
        held=bytes_per_device(state, 4 if config.precision.reduce == "float32" else 2),
        capacity=load_chip(load_mesh_file(config.on).chip).hbm_bytes.value if config.on else 0.0,
        schedules=schedules_of(
            sizes["stage"], config.train.microbatches, layers // sizes["stage"], config.remat.policy != "none"
        )
        if sizes["stage"] > 1
        else (),
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
