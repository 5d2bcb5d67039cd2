"""A batch cut into microbatches of samples and windows of time steps.

              time ─►   window 0   window 1   window 2
    microbatch 0      [  0, 0    |  0, 1    |  0, 2   ]
    microbatch 1      [  1, 0    |  1, 1    |  1, 2   ]

A tensor is *over time* where its second axis is the time axis. What is not, a state or a target per sequence, goes to
every window as it is, or comes from the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, product
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Grid:
    """A batch's cuts into microbatches and windows.

    Attributes:
        sizes: Samples per microbatch.
        lengths: Time steps per window; () without windows.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...] = ()

    @property
    def windows(self) -> int:
        """The number of windows, 1 without a time axis."""
        return max(1, len(self.lengths))

    @property
    def samples(self) -> int:
        """All samples."""
        return sum(self.sizes)

    def units(self, over_time: bool = True) -> Iterator[tuple[int, int]]:
        """(microbatch, window) in the order in which they are counted; of a tensor not over time only last windows."""
        return product(range(len(self.sizes)), range(self.windows) if over_time else [self.windows - 1])

    def part(self, array: np.ndarray[Any, Any], microbatch: int, window: int, over_time: bool) -> Any:
        """A microbatch's rows of an array (n, ...), and a window's columns of one over time."""
        rows = array[self._rows[microbatch]]
        return rows[:, self._steps[window]] if over_time and self.lengths else rows

    def elements(self, microbatch: int, window: int, over_time: bool) -> int:
        """How many elements of a (samples, time) table a unit has: what a mean divides by, up to a factor."""
        return self.sizes[microbatch] * (self.lengths[window] if over_time and self.lengths else 1)

    def is_last(self, window: int) -> bool:
        """Whether a window ends the sequence."""
        return window == self.windows - 1

    @cached_property
    def _rows(self) -> list[slice]:
        return _slices(self.sizes)

    @cached_property
    def _steps(self) -> list[slice]:
        return _slices(self.lengths)


def is_over_time(shape: Sequence[int | None] | None) -> bool:
    """Whether tensors of a symbolic shape (None is free) have the time as their second axis.

    A model that can be run window by window leaves its length free.
    """
    return shape is not None and len(shape) >= 2 and shape[1] is None


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
