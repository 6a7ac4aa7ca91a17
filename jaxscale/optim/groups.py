"""Which parameters an optimizer treats how, read off the model's table of parameters; no array is touched.

A stack of layers is many weights in one array: its `layers` dim never counts as a dim of the weight.
Read next: `build.py`.
"""

from __future__ import annotations

from jaxscale.task import Parameter


def stack_dims(parameter: Parameter) -> int:
    """How many leading dims enumerate weights (layers, experts) instead of belonging to one."""
    if parameter.matrix_dims is not None:
        return len(parameter.shape) - sum(parameter.matrix_dims)
    count = 0
    while count < len(parameter.axes) and parameter.axes[count] == "layers":
        count += 1
    return count


def is_weight(parameter: Parameter) -> bool:
    """Whether it multiplies activations: two or more dims of its own and a random start.

    Norm scales and biases start at a constant, also where a bias has two dims (heads, head_dim).
    """
    if parameter.matrix_dims is not None:
        return True
    return parameter.init == "normal" and len(parameter.shape) - stack_dims(parameter) >= 2


def decays(parameter: Parameter) -> bool:
    """Whether weight decay applies: to weights, not to norm scales and biases."""
    return is_weight(parameter)


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Whether Muon may orthogonalise it: the model says that it acts as one matrix between hidden activations."""
    return parameter.matrix_dims is not None


def matrix_sides(parameter: Parameter) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Positions of the dims that form the (inputs, outputs) sides of a weight; None if it is no weight.

    Without `matrix_dims` the last dim is the output side: an embedding table is (vocabulary | width).
    """
    if not is_weight(parameter):
        return None
    ndim = len(parameter.shape)
    outputs = parameter.matrix_dims[1] if parameter.matrix_dims is not None else 1
    return tuple(range(stack_dims(parameter), ndim - outputs)), tuple(range(ndim - outputs, ndim))
