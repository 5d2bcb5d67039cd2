"""The user's own objects, lent to a comparison: whatever it does with them, they come back with every bit.

What a model's run draws on besides its variables is kept too: the random numbers of Python and NumPy, Keras's generator
for draws without a seed, and the seeds that TensorFlow gives to random operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from stages.keras_internals import keeping_the_global_seed
from stages.put_back import held_by, random_numbers_put_back, values_put_back
from stages.tensorflow_internals import drawing_seeds_from
from stages.worker.snapshot import path_of


class Lent:
    """A loan of the user's objects, and what it left changed.

    Attributes:
        changed: The paths of variables that are not, bit for bit, as they were; known when the loan has ended.
    """

    def __init__(self) -> None:
        self.changed: list[str] = []


@contextmanager
def lent(variables: Iterable[Any]) -> Iterator[Lent]:
    """Give these variables their values back afterwards, and random generators their states.

    Args:
        variables: Keras's or TensorFlow's, all that may be changed meanwhile.
    """
    loan, before = Lent(), []
    try:
        with (
            random_numbers_put_back(),
            values_put_back(variables) as before,
            keeping_the_global_seed(),
            drawing_seeds_from("the user's own model"),
        ):
            yield loan
    finally:
        loan.changed += [path_of(v) for v, value in before if _bits(held_by(v)) != _bits(value)]


def _bits(value: Any) -> bytes:
    return bytes(np.asarray(value).tobytes())


__all__ = ["Lent", "lent"]
