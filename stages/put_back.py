"""Values of variables and random numbers that are put back: what a look at a model must leave as it was."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def held_by(variable: Any) -> Any:
    """The TensorFlow variable in a Keras one; another one itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def quick_read(variable: Any) -> Any:
    """The value of a variable, Keras's or TensorFlow's, in a quarter of the time that `read_value` takes."""
    raw = held_by(variable)
    return tf.raw_ops.ReadVariableOp(resource=raw.handle, dtype=raw.dtype)


@contextmanager
def values_put_back(variables: Iterable[Any]) -> Iterator[list[tuple[Any, Any]]]:
    """Give variables, at the end of a block, the values back that they have now, bit for bit.

    Args:
        variables: Keras's or TensorFlow's, each once or several times.

    Yields:
        (variable, value) of each: a tensor, which costs no copy unless the variable is written.
    """
    before = [(variable, held_by(variable).read_value()) for variable in variables]
    try:
        yield before
    finally:
        for variable, value in before:
            held_by(variable).assign(value)


@contextmanager
def random_numbers_put_back() -> Iterator[None]:
    """Let Python's and NumPy's generators go on, after a block, from where they are now."""
    drawn, numpy_drawn = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numpy_drawn)


__all__ = ["held_by", "quick_read", "random_numbers_put_back", "values_put_back"]
