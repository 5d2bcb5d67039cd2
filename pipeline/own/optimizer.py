"""The user's own optimizer, making one update of the user's own variables in the user's process.

The object in the user's hands may have been built for nothing as yet, or for a training of its own. So what updates is
that object taken back to before it was built: its class and its very attributes, nothing copied or described.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.compiled.compiled import Compiled
from pipeline.compiled.optimizer_slots import OptimizerSlots, Place
from pipeline.own.model import OwnModel
from stages.recipe.optimizer_state import as_unbuilt
from stages.tape.eagerly import eagerly
from stages.tape.optimizer_update import rescaled, update
from stages.worker import snapshot

Array = np.ndarray[Any, Any]
RATE = "learning_rate"
"""The one value of an optimizer that the user's object has, and no stage's copy gives."""


class _Group(NamedTuple):
    """An optimizer, the variables that it updates, and the first stage that has some of them."""

    optimizer: Any
    variables: Sequence[Any]
    first: int


class OwnOptimizer:
    """The optimizers that `compile` was given, over the user's own variables.

    Args:
        compiled: What `compile` was given; with an optimizer.
        model: The user's own model.
    """

    def __init__(self, compiled: Compiled, model: OwnModel) -> None:
        self._trainable = model.trainable
        one = compiled.one_optimizer
        parts = [model.in_model_order] if one else [list({id(v): v for v in p}.values()) for p in self._trainable]
        self._groups = [_group(compiled, stage, variables) for stage, variables in enumerate(parts)]

    def update(self, slots: OptimizerSlots, gradients: Mapping[Place, Any], divisor: float | None) -> OptimizerSlots:
        """One update; the variables have their new values afterwards.

        Args:
            slots: What the optimizer begins with: momenta, moving averages, the count of steps; not its rate.
            gradients: {place of a trainable variable: its gradient, as an optimizer gets it, or None}.
            divisor: What they are divided by first (the loss scale).

        Returns:
            What the optimizer has afterwards.
        """
        places = {id(v): (i, k) for i, part in reversed([*enumerate(self._trainable)]) for k, v in enumerate(part)}
        for group in self._groups:
            for place, name, variable in _slots(group, places):
                given = slots.own_of(group.first) if place[1] < 0 else slots.of_variable.get(place, {})
                if name in given and name != RATE:
                    variable.assign(given[name])
            some = [(gradients.get(places[id(v)]), v) for v in group.variables if id(v) in places]
            pairs = [(gradient, variable) for gradient, variable in some if gradient is not None]
            with eagerly():
                update(group.optimizer, rescaled([g for g, _ in pairs], None, divisor), [v for _, v in pairs])
        return OptimizerSlots.of(
            (place, name, np.asarray(variable.numpy()))
            for group in self._groups
            for place, name, variable in _slots(group, places)
        )


def _group(compiled: Compiled, stage: int, variables: Sequence[Any]) -> _Group:
    given, attributes = compiled.optimizer_of(stage, reference=True)
    optimizer = as_unbuilt(given, attributes)
    optimizer.build(variables)
    return _Group(optimizer, variables, stage)


def _slots(group: _Group, places: Mapping[int, Place]) -> Iterator[tuple[Place, str, Any]]:
    """(place of the model's variable, or (first stage, -1); what it is called; the optimizer's variable)."""
    described = snapshot.optimizer_slots(group.optimizer, group.variables)
    for slot, variable in zip(described, group.optimizer.variables, strict=True):
        if slot.variable < 0:
            yield (group.first, -1), slot.name, variable
        elif id(group.variables[slot.variable]) in places:
            yield places[id(group.variables[slot.variable])], slot.name, variable


__all__ = ["RATE", "OwnOptimizer"]
