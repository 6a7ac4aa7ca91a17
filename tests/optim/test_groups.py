"""Which parameters decay, which are matrices."""

import pytest

from jaxscale.optim import groups
from jaxscale.task import Parameter

CASES = {
    # parameter: (decays, hidden matrix, stack dims, sides)
    "embedding": (Parameter((512, 64), ("vocab", "embed")), True, False, 0, ((0,), (1,))),
    "norm": (Parameter((4, 64), ("layers", "norm"), init="ones"), False, False, 1, None),
    "final norm": (Parameter((64,), ("norm",), init="ones"), False, False, 0, None),
    "bias of two dims": (Parameter((4, 8, 16), ("layers", "heads", "head_dim"), init="zeros"), False, False, 1, None),
    "random vector per layer": (Parameter((4, 64), ("layers", "embed")), False, False, 1, None),
    "query": (
        Parameter((4, 64, 8, 16), ("layers", "embed", "heads", "head_dim"), matrix_dims=(1, 2)),
        True,
        True,
        1,
        ((1,), (2, 3)),
    ),
    "output": (
        Parameter((4, 8, 16, 64), ("layers", "heads", "head_dim", "embed"), matrix_dims=(2, 1)),
        True,
        True,
        1,
        ((1, 2), (3,)),
    ),
    "matrix that starts at zero": (
        Parameter((4, 64, 128), ("layers", "embed", "mlp"), init="zeros", matrix_dims=(1, 1)),
        True,
        True,
        1,
        ((1,), (2,)),
    ),
    "experts": (
        Parameter((4, 3, 64, 128), ("layers", None, "embed", "mlp"), matrix_dims=(1, 1)),
        True,
        True,
        2,
        ((2,), (3,)),
    ),
    "unstacked kernel": (Parameter((3, 3, 16, 32), (None, None, None, None)), True, False, 0, ((0, 1, 2), (3,))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_groups(case):
    parameter, decays, hidden, stack, sides = case
    assert groups.decays(parameter) == decays
    assert groups.is_hidden_matrix(parameter) == hidden
    assert groups.stack_dims(parameter) == stack
    assert groups.matrix_sides(parameter) == sides
