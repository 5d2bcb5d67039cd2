"""Every variable of a stage under a stable name: weights, statistics, seed states, optimizer slots, metrics.

Bitwise resumption needs all of a model's variables, seed generators included, and all of the optimizer's. Optimizer
slots are named by the variable they belong to, so that a checkpoint can be loaded into other cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.errors import HandoffError
from stages.keras_training_internals import slots_of


class OptimizerSlot(NamedTuple):
    """The variable that an optimizer's variable belongs to, and its name.

    Attributes:
        variable: Index of the model's trainable variable, or -1 for the optimizer's own (iterations, learning rate).
        name: What it is: ``"momentums"``, ``"velocities"``, ``"iterations"`` ...
    """

    variable: int
    name: str


def optimizer_slots(optimizer: Any, trainable: Sequence[Any]) -> list[OptimizerSlot]:
    """What each of a built optimizer's variables belongs to, in the order of `optimizer.variables`."""
    of: dict[int, OptimizerSlot] = {}
    for attribute, place, variable in slots_of(optimizer, len(trainable)):
        slot = OptimizerSlot(place, attribute.strip("_"))
        if place >= 0:
            of[id(variable)] = slot
        else:
            of.setdefault(id(variable), slot)
    return [of.get(id(variable), OptimizerSlot(-1, str(variable.name))) for variable in optimizer.variables]


def read(variables: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Copies of the variables' values."""
    return [np.asarray(variable.numpy()) for variable in variables]  # a scalar comes without its array


def path_of(variable: Any) -> str:
    """A Keras variable's path; the name of a TensorFlow variable."""
    return str(getattr(variable, "path", variable.name))


def write(variables: Sequence[Any], values: Sequence[np.ndarray[Any, Any]], where: str) -> None:
    """Assign values, after all of them were checked.

    Raises:
        HandoffError: The number of values, or a shape, does not fit; nothing was assigned.
    """
    if len(values) != len(variables):
        raise HandoffError(f"{where}: expected {len(variables)} array(s), received {len(values)}")
    for variable, value in zip(variables, values, strict=True):
        if tuple(variable.shape) != tuple(value.shape):
            raise HandoffError(
                f"{where}: {path_of(variable)!r} has the shape {tuple(variable.shape)}, received {tuple(value.shape)}"
            )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
