"""The optimizers' counts of updates in the user's process, which the user may set: they decide about schedules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from stages.put_back import quick_read

Array = np.ndarray[Any, Any]


class Counts:
    """The counts of some optimizers, and what they were when they were last held.

    Args:
        optimizers: One for all stages or one for each, without loss scaling around them; built when they are asked.
    """

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self._optimizers = optimizers
        self._held: list[int] = []

    @cached_property
    def variables(self) -> list[Any]:
        """Of all updates; `optimizer.iterations` counts accumulated ones only."""
        return [
            next(variable for variable in optimizer.variables if variable.name == "iteration")
            for optimizer in self._optimizers
        ]

    def hold(self) -> None:
        """Remember them as they are now."""
        self._held = self._now()

    def count(self) -> None:
        """Count one more update, also in what is remembered."""
        for iteration in self.variables:
            iteration.value.assign_add(1, read_value=False)
        self._held = [held + 1 for held in self._held]

    def set_by_hand(self, stages: int) -> dict[int, Array]:
        """{stage: its optimizer's count}, of those that are not what was held; from now on these are held.

        Args:
            stages: How many there are.
        """
        before, now = self._held, self._now()
        self._held = now
        if now == before or len(now) != len(before):
            return {}
        places = {i: 0 if len(now) == 1 else i for i in range(stages)}
        return {i: self.variables[k].numpy() for i, k in places.items() if now[k] != before[k]}

    def _now(self) -> list[int]:
        if any(one is None or not one.built for one in self._optimizers):
            return []
        return [int(np.asarray(quick_read(one))) for one in self.variables]


__all__ = ["Counts"]
