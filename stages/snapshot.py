"""Every variable of a stage under a stable name: weights, statistics, seed states, optimizer slots, metrics.

Bitwise resumption needs all of a model's variables, seed generators included, and all of the optimizer's. Optimizer
slots are named by the variable they belong to, so that a checkpoint can be loaded into other cuts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.errors import HandoffError


class Slot(NamedTuple):
    """What an optimizer variable belongs to.

    Attributes:
        variable: Index of the model's trainable variable, or -1 for the optimizer's own (iterations, learning rate).
        name: What it is: ``"momentum"``, ``"velocity"``, ``"iteration"`` ...
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

    Keras names a slot ``<variable path with _ for />_<slot>``; the longest matching path wins. Where several variables
    have one path, the first slot of a name is the first variable's, and so on.
    """
    stems: dict[str, list[int]] = {}
    for i, variable in enumerate(trainable):
        stems.setdefault(variable.path.replace("/", "_") + "_", []).append(i)
    longest_first = sorted(stems, key=len, reverse=True)
    seen: Counter[str] = Counter()
    slots = []
    for variable in optimizer.variables:
        name = str(variable.name)
        stem = next((stem for stem in longest_first if name.startswith(stem)), None)
        slots.append(Slot(-1, name) if stem is None else Slot(stems[stem][seen[name]], name.removeprefix(stem)))
        seen[name] += 1
    return slots


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
