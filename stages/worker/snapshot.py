"""Every variable of a stage under a stable name: weights, statistics, seed states, optimizer slots, metrics.

Bitwise resumption needs all of a model's variables, seed generators included, and all of the optimizer's. Optimizer
slots are named by the variable they belong to, so that a checkpoint can be loaded into other cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.errors import HandoffError


class Slot(NamedTuple):
    """What an optimizer variable belongs to.

    Attributes:
        variable: Index of the model's trainable variable, or -1 for the optimizer's own (iterations, learning rate).
        name: What it is: ``"momentums"``, ``"velocities"``, ``"iterations"`` ...
    """

    variable: int
    name: str


def unique_names(variables: Sequence[Any]) -> list[str]:
    """The variables' paths, with ``#2`` and so on behind repeated ones."""
    seen: dict[str, int] = {}
    names = []
    for variable in variables:
        count = seen[variable.path] = seen.get(variable.path, 0) + 1
        names.append(variable.path if count == 1 else f"{variable.path}#{count}")
    return names


def optimizer_slots(optimizer: Any, trainable: Sequence[Any]) -> list[Slot]:
    """What each of a built optimizer's variables belongs to, in the order of `optimizer.variables`.

    Keras's optimizers keep a slot in a list with one entry per trainable variable, and what belongs to no variable in
    an attribute; the attribute's name is the slot's. (The slots' own names do not always tell: Adafactor's are like the
    variables', Nadam numbers one anew in every process, and two layers may have one name.)
    """
    of: dict[int, Slot] = {}
    for attribute, slots in vars(optimizer).items():
        if isinstance(slots, list) and len(slots) == len(trainable) and attribute not in _NO_SLOTS:
            of |= {id(slot): Slot(i, attribute.strip("_")) for i, slot in enumerate(slots) if slot is not None}
        else:
            of.setdefault(id(slots), Slot(-1, attribute.strip("_")))
    return [of.get(id(variable), Slot(-1, str(variable.name))) for variable in optimizer.variables]


_NO_SLOTS = ("_variables", "_trainable_variables")
"""Lists of an optimizer that are not a slot: all its own variables, and the model's."""


def read(variables: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Copies of the variables' values."""
    return [np.asarray(variable.value.numpy()) for variable in variables]  # a scalar comes without its array


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
                f"{where}: {variable.path!r} has the shape {tuple(variable.shape)}, received {tuple(value.shape)}"
            )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
