"""Values that workers start from, and optimizer slots by the variable they belong to.

A slot (a momentum, a moving average) is kept under its variable's place, (stage, index among its trainable variables),
so that other cuts of the same layers, and the joined Keras model, can take it over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import CheckpointError
from stages.snapshot import Slot

Array = np.ndarray[Any, Any]
Place = tuple[int, int]
"""(stage, index among its trainable variables)."""
Described = Mapping[int, Sequence[Sequence[Any]]]
"""For each stage what its optimizer's variables belong to: (index of the trainable variable or -1, slot name)."""


@dataclass
class Slots:
    """Optimizer values by variable and slot name.

    Attributes:
        of_variable: {place of a trainable variable: {slot name: value}}.
        shared: {name: value} of the optimizer's own (iterations, learning rate), equal in every stage.
    """

    of_variable: dict[Place, dict[str, Array]] = field(default_factory=dict)
    shared: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterator[tuple[Place | None, str, Array]]) -> Slots:
        """From (place, or None for the optimizer's own; slot name; value)."""
        slots = cls()
        for place, name, value in entries:
            home = slots.shared if place is None else slots.of_variable.setdefault(place, {})
            home[name] = value
        return slots

    @classmethod
    def of_stages(cls, described: Described, values: Mapping[int, Sequence[Array]]) -> Slots:
        """From every stage's optimizer variables, as the stages describe them (see `stages.snapshot.Slot`)."""
        return cls.of(
            ((i, slot.variable) if slot.variable >= 0 else None, slot.name, value)
            for i, slots in described.items()
            for slot, value in zip((Slot(*entry) for entry in slots), values[i], strict=True)
        )

    def ordered(self, wanted: Sequence[tuple[Place | None, str]]) -> list[Array]:
        """The values for an optimizer's variables.

        Raises:
            CheckpointError: A slot is missing, as when another optimizer was saved.
        """
        found = []
        for place, name in wanted:
            source = self.shared if place is None else self.of_variable.get(place, {})
            if name not in source:
                raise CheckpointError(
                    f"there is no optimizer slot {name!r} for "
                    f"{'the optimizer' if place is None else f'stage {place[0]}'}: it was saved with another optimizer"
                )
            found.append(source[name])
        return found

    def for_stages(self, described: Described) -> dict[int, list[Array]]:
        """The values in the order of stages that describe their optimizer variables so."""
        return {
            i: self.ordered([((i, k) if k >= 0 else None, name) for k, name in slots]) for i, slots in described.items()
        }

    def moved(self, old: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]]) -> Slots:
        """The same slots under other cuts.

        Args:
            old: For each stage its trainable variables (objects), as the slots are kept.
            new: For each stage of the other cuts its trainable variables, the same objects in other groups.
        """
        at = {id(variable): (i, k) for i, part in enumerate(old) for k, variable in enumerate(part)}
        places = {(i, k): at[id(variable)] for i, part in enumerate(new) for k, variable in enumerate(part)}
        return Slots({place: self.of_variable.get(before, {}) for place, before in places.items()}, self.shared)


@dataclass
class State:
    """Values that fresh workers start from.

    Attributes:
        model: For each stage the values of its model's variables, in order.
        slots: The optimizer's; None leaves it as new.
    """

    model: dict[int, list[Array]] = field(default_factory=dict)
    slots: Slots | None = None


def described_slots(descriptions: Mapping[int, Mapping[str, Any]]) -> Described:
    """Every stage's optimizer variables, out of what the workers say of their stages."""
    return {i: description["slots"] for i, description in descriptions.items()}
