"""The variables that a part trains, each with a place that stays, whatever `trainable` is set to meanwhile.

    trainable         [k, b]      []          [k, b]        a discriminator in its own step, the generator's, its own
    places            (0, 1)      ()          (0, 1)        sums of gradients are kept by place

Whoever trains two models against each other by hand freezes one while the other learns. What was added up for a
variable before waits at its place until it is trained again, or is cleared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Trained:
    """Places of variables, in the order in which they are first seen.

    Attributes:
        variables: All that were seen; a variable's place is its index.
    """

    def __init__(self) -> None:
        self.variables: list[Any] = []
        self._place: dict[int, int] = {}

    def places(self, variables: Iterable[Any]) -> tuple[int, ...]:
        """The places of some variables; one that was not seen before gets the next place."""
        found = []
        for variable in variables:
            place = self._place.get(id(variable))
            if place is None:
                place = self._place[id(variable)] = len(self.variables)
                self.variables.append(variable)
            found.append(place)
        return tuple(found)

    def spread(self, places: Iterable[int], values: Iterable[Any | None]) -> list[Any | None]:
        """One value per place: the given ones at theirs, None at the others."""
        found: list[Any | None] = [None] * len(self.variables)
        for place, value in zip(places, values, strict=True):
            found[place] = value
        return found
