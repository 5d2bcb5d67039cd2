"""Sum gradients over microbatches in one fixed order, whatever order they arrive in.

Floating-point sums depend on order, so the order is part of the contract: ascending microbatch (and, within one,
ascending window order of arrival). A contribution that arrives early waits; one that continues the sequence is added at
once, so a schedule that runs backwards in ascending order holds a single sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

Gradients = Sequence[Any | None]


class OrderedSum:
    """Per-variable sums of gradients, added in ascending microbatch order.

    None is "no gradient": it adds nothing, and a variable that only ever got None sums to None.
    """

    def __init__(self) -> None:
        self._sums: list[Any | None] | None = None
        self._next = 0
        self._early: dict[int, list[Gradients]] = {}

    def add(self, microbatch: int, gradients: Gradients) -> None:
        """Add one microbatch's gradients (dense tensors or None), now or when its turn comes."""
        self._early.setdefault(microbatch, []).append(gradients)
        while self._next in self._early:
            self._fold(self._next)
            self._next += 1

    def total(self) -> list[Any | None] | None:
        """The sums so far, in ascending order of what is there; None if nothing was added."""
        for microbatch in sorted(self._early):
            self._fold(microbatch)
            self._next = max(self._next, microbatch + 1)
        return self._sums

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def _fold(self, microbatch: int) -> None:
        for gradients in self._early.pop(microbatch):
            if self._sums is None:
                self._sums = list(gradients)
            else:
                self._sums = [_plus(a, b) for a, b in zip(self._sums, gradients, strict=True)]


def _plus(a: Any | None, b: Any | None) -> Any | None:
    if a is None or b is None:
        return b if a is None else a
    return tf.add(a, b)


def dense(gradient: Any | None) -> Any | None:
    """A gradient without `IndexedSlices`: rows that an embedding used twice are summed."""
    return None if gradient is None else tf.convert_to_tensor(gradient)
