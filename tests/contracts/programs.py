"""Abstract programs of a config, for tests that read HLO or lower without devices."""

import jax
import jax.numpy as jnp

from jaxscale import axes
from jaxscale.data import source
from jaxscale.mesh import mesh_sizes
from jaxscale.optim.build import make_optimizer
from jaxscale.train.accumulate import loss_and_gradients
from jaxscale.train.evaluate import make_evaluate
from jaxscale.train.state import abstract_state
from jaxscale.train.step import make_step


def abstract_batch(config, mesh):
    shards = axes.batch_shards(mesh_sizes(mesh))
    rows = axes.padded_batch(config.data.batch, config.train.microbatches, shards)
    return source.abstract_batch(config.model.layout(config.data.sequence), rows, mesh)


def lower_gradients(config, mesh, platforms=None):
    """Forward and backward; call inside `jax.set_mesh`, or `use_abstract_mesh` with the platforms to lower for."""
    task = config.model.task(config)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))

    def gradients(params, batch):
        return loss_and_gradients(task, params, batch, jax.random.key(0), config.train.microbatches, False)

    return jax.jit(gradients).trace(params, abstract_batch(config, mesh)).lower(lowering_platforms=platforms)


def trace_step(config, mesh):
    """The whole training step; call inside `jax.set_mesh` or `use_abstract_mesh`."""
    task = config.model.task(config)
    optimizer = make_optimizer(config.optim, task.parameters, config.steps)
    step = make_step(config, task, optimizer)
    state = abstract_state(config, task, optimizer)
    return step.trace(state, abstract_batch(config, mesh), jax.ShapeDtypeStruct((), jnp.int32))


def lower_evaluation(config, mesh):
    """Evaluation of one batch; call inside `jax.set_mesh`."""
    task = config.model.task(config)
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    return make_evaluate(task).lower(params, abstract_batch(config, mesh))
