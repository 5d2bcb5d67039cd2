"""Values that workers start from, and optimizer slots by the variable they belong to.

A slot (a momentum, a moving average) is kept under its variable's place, (stage, index among its trainable variables),
so that other cuts of the same layers, and the joined Keras model, can take it over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import CheckpointError, CompileError
from stages.worker.description import StageDescription
from stages.worker.snapshot import OptimizerSlot

Array = np.ndarray[Any, Any]
Place = tuple[int, int]
"""(stage, index among its trainable variables)."""
Described = Mapping[int, Sequence[OptimizerSlot]]
"""For each stage what its optimizer's variables belong to."""


@dataclass
class OptimizerSlots:
    """Optimizer values by variable and slot name.

    Attributes:
        of_variable: {place of a trainable variable: {slot name: value}}.
        own: {stage: {name: value}} of the stages' optimizers' own: iterations, learning rate.
    """

    of_variable: dict[Place, dict[str, Array]] = field(default_factory=dict)
    own: dict[int, dict[str, Array]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[tuple[Place, str, Array]]) -> OptimizerSlots:
        """From (place, with the index -1 for the optimizer's own; slot name; value)."""
        slots = cls()
        for place, name, value in entries:
            stage, k = place
            home = slots.own.setdefault(stage, {}) if k < 0 else slots.of_variable.setdefault(place, {})
            home[name] = value
        return slots

    def own_of(self, stage: int) -> dict[str, Array]:
        """What belongs to a stage's optimizer itself; the first's, where one optimizer was saved for all stages."""
        return self.own[stage] if stage in self.own else self.own.get(min(self.own, default=0), {})

    @classmethod
    def of_stages(cls, described: Described, values: Mapping[int, Sequence[Array]]) -> OptimizerSlots:
        """From the stages' optimizer variables, which they describe by `stages.worker.snapshot.OptimizerSlot`."""
        return cls.of(
            ((i, slot.variable), slot.name, value)
            for i, slots in described.items()
            for slot, value in zip(slots, values[i], strict=True)
        )

    def ordered(self, wanted: Sequence[tuple[Place, str]]) -> list[Array]:
        """The values for an optimizer's variables, asked for as `of` takes them.

        Raises:
            CheckpointError: A slot is missing, as when another optimizer was saved.
        """
        found = []
        for place, name in wanted:
            source = self.own_of(place[0]) if place[1] < 0 else self.of_variable.get(place, {})
            if name not in source:
                raise CheckpointError(
                    f"there is no optimizer slot {name!r} for stage {place[0]}: it was saved with another optimizer"
                )
            found.append(source[name])
        return found

    def for_stages(self, described: Described) -> dict[int, list[Array]]:
        """The values in the order of stages that describe their optimizer variables so."""
        return {i: self.ordered([((i, slot.variable), slot.name) for slot in slots]) for i, slots in described.items()}

    def among(self, before: Mapping[int, Sequence[int]], after: Mapping[int, Sequence[int]]) -> OptimizerSlots:
        """The same slots when other variables of the same stages are trained.

        Args:
            before: For each stage its trainable variables, each a number among all its variables, as slots are kept.
            after: The same, of which slots are asked for now.

        Raises:
            CompileError: The optimizer has no slots for a variable.
        """
        found = OptimizerSlots(own=self.own)
        for i, numbers in after.items():
            places = {number: k for k, number in enumerate(before[i])}
            for k, number in enumerate(numbers):
                if number not in places:
                    raise CompileError(
                        "a layer was made trainable that the optimizer does not know; compile with a new optimizer "
                        "object, as in Keras, whose optimizers know the variables that they were built for"
                    )
                found.of_variable[i, k] = self.of_variable.get((i, places[number]), {})
        return found

    def moved(self, old: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]]) -> OptimizerSlots:
        """The same slots under other cuts.

        Args:
            old: For each stage its trainable variables (objects), as the slots are kept.
            new: For each stage of the other cuts its trainable variables, the same objects in other groups.
        """
        at = {id(variable): (i, k) for i, part in enumerate(old) for k, variable in enumerate(part)}
        places = {(i, k): at[id(variable)] for i, part in enumerate(new) for k, variable in enumerate(part)}
        slots = {place: self.of_variable.get(before, {}) for place, before in places.items()}
        return OptimizerSlots(slots, {0: self.own_of(0)} if self.own else {})


@dataclass
class StartValues:
    """Values that fresh workers start from.

    Attributes:
        model: For each stage the values of its model's variables, in order.
        slots: The optimizer's; None: what the user's own optimizers know, else as new.
        anew: The stages that are not to take them over, since they have another optimizer now.
        layer_states: For each stage the states of its stateful layers; empty: those of the user's own layers.
        kept_states: For each stage what it begins its next batch with under `keep_state`; empty: the initial states.
    """

    model: dict[int, list[Array]] = field(default_factory=dict)
    slots: OptimizerSlots | None = None
    anew: frozenset[int] = frozenset()
    layer_states: dict[int, list[Array]] = field(default_factory=dict)
    kept_states: dict[int, list[Array]] = field(default_factory=dict)


def described_slots(descriptions: Mapping[int, StageDescription]) -> Described:
    """Every stage's optimizer variables, out of what the workers say of their stages."""
    return {i: description.slots for i, description in descriptions.items()}
