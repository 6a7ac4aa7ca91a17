"""What the program of a step with embedding tables holds: all-to-alls and no gather of a table, and never an array of
the gradient's or an optimizer's kind that is as large as a table.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from programs import trace_step

from jaxscale import axes
from jaxscale.config import Config, DataConfig, OptimConfig, PrecisionConfig
from jaxscale.mesh import mesh_sizes
from jaxscale.models.dlrm_config import DlrmConfig
from jaxscale.optim.sparse import SparseRule
from jaxscale.testing.hlo import by_axis, collectives

BATCH, WIDTH, TABLES = 64, 16, (3 * 1024 * 200, 3 * 1024 * 100)
ROWS = ("data", "fsdp", "expert")
MESHES = {"rows": {"data": 2, "fsdp": 2, "expert": 2}, "tensor": {"data": 2, "fsdp": 2, "tensor": 2}}


def config(placement="row", exchange=0.0):
    return Config(
        "tables",
        DlrmConfig(
            tables=TABLES, dense=4, width=WIDTH, bottom=(16,), top=(16,), placement=(placement,), exchange=exchange
        ),
        data=DataConfig(batch=BATCH),
        optim=OptimConfig(weight_decay=0.0),
        precision=PrecisionConfig(compute="float32"),
    )


def mesh_of(sizes):
    shape = tuple(sizes.get(axis, 1) for axis in axes.AXES)
    return jax.make_mesh(shape, axes.AXES, devices=jax.devices()[: math.prod(shape)])


@pytest.mark.parametrize(
    ("placement", "exchange", "mesh"),
    [("row", 0.0, "rows"), ("row", 2.0, "tensor"), ("column", 0.0, "tensor"), ("table", 0.0, "rows")],
)
def test_lookup_and_gradient_exchange_by_all_to_all_alone(placement, exchange, mesh):
    """Two all-to-alls there and back, two for the gradient; beside them sums of single numbers and borders."""
    tables = config(placement, exchange).model.task(config(placement, exchange)).tables
    (group,), rule = tables.groups, SparseRule("rowwise-adagrad", 1e-8)
    mesh = mesh_of(MESHES[mesh])
    with jax.set_mesh(mesh):

        def both(table, slot, ids):
            bags, counts = group.look_up(table, ids)
            return bags, counts, group.update(rule, table, slot, ids, jnp.cos(bags), jnp.float32(0.1))

        def of(shape, names, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=axes.sharding(names))

        shape, names = group.parameter.shape, group.slot_axes(1)
        arguments = (
            of(shape, group.parameter.axes, jnp.float32),
            of(shape[: len(names)], names, jnp.float32),
            of((BATCH, len(TABLES)), ("act_batch", None), jnp.int32),
        )
        text = jax.jit(both, donate_argnums=(0, 1)).lower(*arguments).compile().as_text()
    found = by_axis(collectives(text, mesh_sizes(mesh)))
    split = tuple(axis for axis in ROWS if mesh.shape[axis] > 1)
    owners = math.prod(mesh.shape[axis] for axis in split)
    assert {kind for kind, _ in found} <= {"all-to-all", "all-reduce"}
    # Emulated devices exchange a tuple with an array for each of them; a real all-to-all counts once.
    assert found.pop(("all-to-all", split)) in (4, 4 * owners, 3, 3 * owners)
    large = by_axis(collectives(text, mesh_sizes(mesh)), at_least=BATCH * WIDTH)
    assert all(kind == "all-to-all" for kind, _ in large), large


@pytest.mark.parametrize("placement", ["row", "column", "table"])
def test_no_array_of_a_step_is_as_large_as_a_table(placement):
    """A dense gradient, or a second copy of the tables, would be: temporary memory is a small part of a table's."""
    with jax.set_mesh(mesh_of(MESHES["rows"])):
        compiled = trace_step(config(placement), jax.sharding.get_mesh()).lower().compile()
    memory = compiled.memory_analysis()
    table = sum(TABLES) * WIDTH * 4 // 8
    assert memory.argument_size_in_bytes > table
    assert memory.alias_size_in_bytes > table, "the new tables are written over the old ones"
    assert memory.temp_size_in_bytes < table / 50, (memory.temp_size_in_bytes, table)
    # Whatever makes an array of a table's size on a device writes into the table itself, row by row.
    shard = sum(TABLES) * WIDTH // 8
    makers = re.findall(r"= f32\[([0-9,]+)\]\S* ([a-z-]+)\((.*)", compiled.as_text())
    large = [(kind, rest) for dims, kind, rest in makers if math.prod(map(int, dims.split(","))) >= shard / 2]
    assert {kind for kind, _ in large} <= {"parameter", "scatter", "bitcast", "fusion"}, large
    assert all("scatter" in rest for kind, rest in large if kind == "fusion"), large
