"""Sum gradients over microbatches in one fixed order, whatever order they arrive in.

Floating-point sums depend on order, so the order is part of the contract: the windows of a microbatch are added as they
come, which is backward in time, and microbatches in ascending order. A contribution that arrives early waits; one that
continues the sequence is added at once, so a schedule that runs backwards in ascending order holds a single sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import tensorflow as tf

from stages.tape.embedding_rows import added, is_sparse, joined_rows

Gradients = Sequence[Any | None]
Contribution = list[Any | None]
"""What one microbatch (or all of them, summed) adds to some variables."""


class OrderedSum:
    """Per-variable sums of gradients, added in ascending microbatch order.

    None is "no gradient": it adds nothing, and a variable that only ever got None sums to None. The sum of
    `tf.IndexedSlices` is all their rows, in order; beside a dense tensor they become dense.

    Args:
        kept_apart: Variables (by place) of which every microbatch's contribution is kept besides the sum.

    Attributes:
        fixed_rows: Variables whose rows are the same in every microbatch, so that their values are added.
    """

    def __init__(self, kept_apart: Sequence[int] = ()) -> None:
        self._kept_apart = tuple(kept_apart)
        self.fixed_rows: frozenset[int] = frozenset()
        self._sums: list[Any | None] | None = None
        self._next = 0
        self._early: dict[int, list[Any | None]] = {}
        self._complete: set[int] = set()
        self._apart: list[dict[int, Any | None]] = []

    def add(self, microbatch: int, gradients: Gradients, complete: bool = True) -> None:
        """Add a microbatch's gradients (of one of its windows), now or when its turn comes.

        Args:
            microbatch: Its number, from 0.
            gradients: Dense tensors, `tf.IndexedSlices` or None, one per variable.
            complete: Whether these are its last.
        """
        so_far = self._early.get(microbatch)
        total = list(gradients) if so_far is None else [plus(a, b) for a, b in zip(so_far, gradients, strict=True)]
        self._early[microbatch] = total
        if complete:
            self._complete.add(microbatch)
        while self._next in self._complete:
            self._fold(self._next)
            self._next += 1

    def widen(self, variables: int) -> None:
        """Make room for more variables, behind those there are; nothing was added to them yet."""
        for sums in (*self._early.values(), *([] if self._sums is None else [self._sums])):
            sums += [None] * (variables - len(sums))

    def total(self) -> list[Any | None] | None:
        """The sums so far, in ascending order of what is there; None if nothing was added."""
        for microbatch in sorted(self._early):
            self._fold(microbatch)
            self._next = max(self._next, microbatch + 1)
        return self._sums

    def contributions(self, places: Sequence[int]) -> list[Contribution]:
        """What was added to some of the variables that are kept apart: one entry per call of `add`, in order.

        Of `fixed_rows` all is in the first entry.
        """
        self.total()
        found = [[apart[place] for place in places] for apart in self._apart]
        for column, place in enumerate(places):
            if place in self.fixed_rows and found:
                total = reduce(lambda a, b: plus(a, b, True), (entry[column] for entry in found))
                for number, entry in enumerate(found):
                    entry[column] = None if number else total
        return found

    def replace(self, places: Sequence[int], totals: Sequence[Any | None]) -> None:
        """Put other sums in place of some."""
        sums = self.total()
        if sums is not None:
            for place, value in zip(places, totals, strict=True):
                sums[place] = value

    def clear(self) -> None:
        """Forget everything."""
        self._sums, self._next = None, 0
        self._early.clear()
        self._complete.clear()
        self._apart.clear()

    def _fold(self, microbatch: int) -> None:
        gradients = self._early.pop(microbatch)
        self._complete.discard(microbatch)
        if self._kept_apart:
            self._apart.append({place: gradients[place] for place in self._kept_apart})
        if self._sums is None:
            self._sums = list(gradients)
        else:
            self._sums = plus_all(self._sums, gradients, self.fixed_rows)


def plus_all(a: Gradients, b: Gradients, fixed_rows: frozenset[int] = frozenset()) -> list[Any | None]:
    """The sum of two microbatches' gradients; of the variables in `fixed_rows` both have the same rows."""
    return [plus(x, y, i in fixed_rows) for i, (x, y) in enumerate(zip(a, b, strict=True))]


def plus(a: Any | None, b: Any | None, fixed_rows: bool = False) -> Any | None:
    """The sum, where None adds nothing; rows of an embedding beside rows are all of them, unless they are the same."""
    if a is None or b is None:
        return b if a is None else a
    if is_sparse(a) and is_sparse(b):
        return added(a, b) if fixed_rows and a.values.shape == b.values.shape else joined_rows([a, b])
    return tf.add(dense(a), dense(b))


def dense(gradient: Any) -> Any:
    """A gradient as one tensor of its variable's shape: rows that an embedding used twice are summed."""
    if isinstance(gradient, tf.IndexedSlices):  # as TensorFlow converts it, without its warning of unknown shapes
        rows = tf.cast(gradient.dense_shape[0], tf.int32)
        return tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)
    return None if gradient is None else tf.convert_to_tensor(gradient)
