"""Observers of the cuts, at both ends: every activation and gradient as it was sent and as it arrived.

A verification compares the two ends with each other (nothing may change on the way) and each with one tape; watching a
training run needs their norms alone. Nobody looks unless asked: an observer costs a copy of the batch's activations and
gradients (values), or one pass over each (norms).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
ACTIVATION, MASK, GRADIENT, SHARED = "activation", "mask", "gradient", "shared_gradient"
CROSSES = (ACTIVATION, MASK, GRADIENT, SHARED)
"""The kinds of messages between stages."""


class Sight(NamedTuple):
    """The place where a tensor was seen.

    Attributes:
        what: `ACTIVATION`, its `MASK`, `GRADIENT` (dL/dOut), or `SHARED` (of a tied variable).
        sent: True is the sender's copy, False the receiver's.
        producer: The stage whose output the tensor is; of `SHARED` the sender.
        consumer: The stage that takes it; of `SHARED` the receiver.
        tensor: Its name.
        microbatch: Number.
        window: Number.
    """

    what: str
    sent: bool
    producer: int
    consumer: int
    tensor: str
    microbatch: int
    window: int


Observer = Callable[[Sight, Any], None]
"""Takes a sight and the array (None: "no gradient")."""


class ValueObserver:
    """Keeps everything that was seen."""

    def __init__(self, seen: dict[Sight, Array | None] | None = None) -> None:
        self.seen = {} if seen is None else seen

    def __call__(self, sight: Sight, array: Any) -> None:
        """Keep a copy: buffers may be reused."""
        self.seen[sight] = None if array is None else np.array(array)


class NormObserver:
    """Keeps of each tensor at a cut what its norm over the batch is made of."""

    def __init__(self) -> None:
        self.squares: dict[tuple[str, int, int, str], float] = {}
        """{(what, producer, consumer, tensor): sum of squares over all microbatches and windows, where it was sent}."""

    def __call__(self, sight: Sight, array: Any) -> None:
        """Add its squares."""
        if sight.sent and array is not None and np.asarray(array).dtype.kind in "fV":
            place = (sight.what, sight.producer, sight.consumer, sight.tensor)
            self.squares[place] = self.squares.get(place, 0.0) + sum_of_squares(np.asarray(array))


def sum_of_squares(array: Array) -> float:
    """In float64, by blocks that stay in the cache: a large activation is read once, no copy of its size is made."""
    flat = array.reshape(-1)
    total = 0.0
    with np.errstate(over="ignore"):  # then it is infinite
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float64)
            total += float(np.sum(np.square(block, out=block)))  # no BLAS: its threads wait for each other
    return total


_BLOCK = 1 << 14


def observer_named(kind: str) -> ValueObserver | NormObserver | None:
    """The observer that an order asks for: ``"values"``, ``"norms"``, or ``""`` for none."""
    return {"values": ValueObserver, "norms": NormObserver}[kind]() if kind else None
